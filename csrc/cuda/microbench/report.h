// The table on the screen and the JSON of a run. Host code alone.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda/microbench/statistics.h"

namespace fused_rnn::microbench {

// One benchmark in one variant, and at one size.
struct Case {
  std::string benchmark, variant;
  int blocks = 1;
  int cluster = 1;  // blocks of a cluster
};

inline std::string name_of(const Case& c) {
  std::string name = c.benchmark + " " + c.variant + ", " + std::to_string(c.blocks) + " block" +
                     (c.blocks == 1 ? "" : "s");
  if (c.cluster > 1) name += " in clusters of " + std::to_string(c.cluster);
  return name;
}

// What one step of it takes, or why it is not there.
struct Row {
  Case which;
  int repeats = 0;
  long long steps = 0;  // of a repeat
  Summary ns{}, clocks{};
  double multiply_adds = 0;  // of a step; 0 where it does not count them
  std::string absent;
};

// Multiply-adds a clock, of a multiprocessor.
inline double rate_of(const Row& row) { return row.multiply_adds / row.clocks.median; }

inline std::string text(const char* format, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, format, value);
  return buffer;
}

inline std::string table_head() {
  char buffer[160];
  std::snprintf(buffer, sizeof buffer, "%-20s %-22s %6s %7s %10s %21s %10s %10s", "benchmark",
                "variant", "blocks", "cluster", "ns/step", "[quartiles]", "min", "clocks");
  return buffer;
}

inline std::string table_line(const Row& row) {
  char start[128], rest[160];
  std::snprintf(start, sizeof start, "%-20s %-22s %6d %7d", row.which.benchmark.c_str(),
                row.which.variant.c_str(), row.which.blocks, row.which.cluster);
  if (!row.absent.empty()) return std::string(start) + "  absent: " + row.absent;
  const std::string quartiles =
      "[" + text("%.1f", row.ns.q25) + ", " + text("%.1f", row.ns.q75) + "]";
  std::snprintf(rest, sizeof rest, " %10.1f %21s %10.1f %10.1f", row.ns.median, quartiles.c_str(),
                row.ns.min, row.clocks.median);
  std::string line = std::string(start) + rest;
  if (row.multiply_adds > 0) line += text("  %.0f multiply-adds/clock/SM", rate_of(row));
  return line;
}

// JSON, as far as it is needed here.

inline std::string json(const std::string& value) {
  std::string out = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char buffer[8];
      std::snprintf(buffer, sizeof buffer, "\\u%04x", c);
      out += buffer;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

inline std::string json(double value) {
  return std::isfinite(value) ? text("%.10g", value) : "null";
}

inline std::string json(const Summary& s) {
  return "{\"median\": " + json(s.median) + ", \"q25\": " + json(s.q25) +
         ", \"q75\": " + json(s.q75) + ", \"min\": " + json(s.min) + ", \"max\": " + json(s.max) +
         "}";
}

inline std::string json(const Row& row) {
  const Case& c = row.which;
  std::string out = "{\"benchmark\": " + json(c.benchmark) + ", \"variant\": " + json(c.variant) +
                    ", \"blocks\": " + json(c.blocks) + ", \"cluster\": " + json(c.cluster);
  if (!row.absent.empty()) return out + ", \"absent\": " + json(row.absent) + "}";
  out += ", \"repeats\": " + json(row.repeats) +
         ", \"steps\": " + json(static_cast<double>(row.steps)) + ", \"ns\": " + json(row.ns) +
         ", \"clocks\": " + json(row.clocks);
  if (row.multiply_adds > 0) out += ", \"multiply_adds_per_clock\": " + json(rate_of(row));
  return out + "}";
}

// Of each entry the value is JSON already.
using Meta = std::vector<std::pair<std::string, std::string>>;

inline std::string json(const Meta& meta, const std::vector<Row>& rows,
                        const std::string& failure) {
  std::string out = "{\n \"meta\": {";
  for (std::size_t i = 0; i < meta.size(); ++i) {
    out += (i ? ",\n  " : "\n  ") + json(meta[i].first) + ": " + meta[i].second;
  }
  out += "\n },\n \"failure\": " + (failure.empty() ? "null" : json(failure)) + ",\n \"rows\": [";
  for (std::size_t i = 0; i < rows.size(); ++i) out += (i ? ",\n  " : "\n  ") + json(rows[i]);
  return out + "\n ]\n}\n";
}

}  // namespace fused_rnn::microbench
