// The operator fused_rnn::cpu_layers: every layer of a model in one call where no gradient is asked
// for, input projections included. It runs the kernels that the operators of one layer run, so the
// numbers are theirs; what it saves is what lies between them.
#include <vector>

#include "layer.h"
#include "ragged.h"

namespace fused_rnn::cpu {
namespace {

constexpr int kMaxDirections = 2;
constexpr uint8_t kReverse[kMaxDirections] = {0, 1};

// The weights of one layer in one direction.
struct Direction {
  Tensor w_ih, w_hh;
  MaybeTensor b_ih, b_hh, w_hr;
};

class Model {
 public:
  Model(const Tensor& x, const MaybeTensor& h0, const MaybeTensor& c0,
        const std::vector<Tensor>& weights, const MaybeTensor& flags, int64_t cell, bool bias,
        bool projected, bool bidirectional, bool relu)
      : cell_(cell), relu_(relu), directions_(bidirectional ? 2 : 1), x_(x) {
    gates_ = gates_of(cell);
    STD_TORCH_CHECK(x.is_cpu(), "x must be a CPU tensor");
    STD_TORCH_CHECK(!projected || cell == 0, "only the LSTM has a projection");
    const size_t each = 2 + 2 * bias + projected;
    STD_TORCH_CHECK(!weights.empty() && weights.size() % (each * directions_) == 0,
                    "weights must have ", each, " tensors for every layer and direction, got ",
                    weights.size());
    layers_ = static_cast<int64_t>(weights.size() / (each * directions_));
    check_shape("x", x, {kAny, kAny, kAny}, "[T, B, I]", x);
    steps_ = x.size(0), batch_ = x.size(1);
    STD_TORCH_CHECK(steps_ > 0, "x must have steps");
    STD_TORCH_CHECK(weights[1].dim() == 2, "w_hh must have shape [G*H, P]");
    hidden_ = weights[1].size(0) / gates_, out_ = weights[1].size(1);
    STD_TORCH_CHECK(hidden_ > 0 && out_ > 0 && (projected || hidden_ == out_),
                    "w_hh must have shape [", gates_, "*H, H] with H > 0, got ",
                    shape_of(weights[1]));
    io_ = dtype_of("w_hh", weights[1]), acc_ = acc_of(io_);
    same_dtype("x", x);
    for (int64_t at = 0; at < layers_ * directions_; ++at) {
      const Tensor* w = &weights[at * each];
      const int64_t inputs = at < directions_ ? x.size(2) : directions_ * out_;
      Direction d{kept("w_ih", w[0], {rows(), inputs}, "[G*H, I]"),
                  kept("w_hh", w[1], {rows(), out_}, "[G*H, P]"),
                  {},
                  {},
                  {}};
      if (bias) {
        d.b_ih = kept("b_ih", w[2], {rows()}, "[G*H]");
        d.b_hh = kept("b_hh", w[3], {rows()}, "[G*H]");
      }
      if (projected) d.w_hr = kept("w_hr", w[each - 1], {out_, hidden_}, "[P, H]");
      weights_.push_back(d);
    }
    const int64_t entries = layers_ * directions_;
    if (h0) h0_ = kept("h0", *h0, {entries, batch_, out_}, "[L*D, B, P]");
    if (c0) c0_ = kept("c0", *c0, {entries, batch_, hidden_}, "[L*D, B, H]");
    if (flags) {
      STD_TORCH_CHECK(flags->scalar_type() == ScalarType::Byte, "flags must be uint8");
      check_shape("flags", *flags, {steps_, batch_}, "[T, B]", x);
      flags_ = as_contiguous(*flags);
    }
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    const int64_t entries = layers_ * directions_, width = directions_ * out_;
    Tensor y = new_tensor(x_, {steps_, batch_, width}, io_);
    Tensor h_n = new_tensor(x_, {entries, batch_, out_}, io_);
    Tensor c_n =
        cell_ == 0 ? new_tensor(x_, {entries, batch_, hidden_}, io_) : new_tensor(x_, {0}, io_);
    if (batch_ == 0) return {y, h_n, c_n};
    h_n_ = h_n.mutable_data_ptr(), c_n_ = cell_ == 0 ? c_n.mutable_data_ptr() : nullptr;
    const Sequence given(x_, io_, false);
    if (flags_) {
      flags_data_ = static_cast<const uint8_t*>(flags_->const_data_ptr());
      LiveRows order(flags_data_, steps_, batch_);
      if (order.any_ends()) {
        run_in(order, given.rows, y.mutable_data_ptr());
        return {y, h_n, c_n};
      }
    }
    h0_data_ = h0_ ? data_of(*h0_) : nullptr, c0_data_ = c0_ ? data_of(*c0_) : nullptr;
    run_layers(given.rows, y.mutable_data_ptr());
    return {y, h_n, c_n};
  }

 private:
  // All layers on x [T, B, I], into y [T, B, D*P].
  void run_layers(const Rows& x, void* y) const {
    const int64_t width = directions_ * out_, step = places_.apart(batch_) * width;
    const int64_t sequence = places_.at(steps_) * step * size_of(io_);
    const Buffer bias(directions_ * rows() * size_of(acc_));
    const Buffer between(layers_ > 1 ? sequence : 0), other(layers_ > 2 ? sequence : 0);
    for (int64_t layer = 0; layer < layers_; ++layer) {
      void* to = layer + 1 == layers_ ? y : layer % 2 ? other.at() : between.at();
      void* from = layer % 2 ? between.at() : other.at();
      const Rows input = layer == 0 ? x : Rows{from, io_, step, width, 0};
      run_layer(layer, input, layer == 0 ? x_.size(2) : width, bias, to);
    }
  }

  // As run_layers, of the rows that live at each step alone.
  void run_in(LiveRows& order, const Rows& x, void* y) {
    const int64_t entries = layers_ * directions_;
    const auto gathered = [&](const MaybeTensor& state, int64_t size) -> void* {
      if (!state) return nullptr;
      return order.states(Rows{data_of(*state), io_, 0, size, batch_ * size}, entries, size).data;
    };
    h0_data_ = gathered(h0_, out_), c0_data_ = gathered(c0_, hidden_);
    const Rows h_n = order.new_states(io_, entries, out_);
    const Rows c_n = order.new_states(io_, cell_ == 0 ? entries : 0, hidden_);
    void *h_out = h_n_, *c_out = c_n_;
    h_n_ = h_n.data, c_n_ = c_n.data, places_ = order.places();
    flags_data_ = order.flags(flags_data_);
    const Rows y_there = order.new_sequence(io_, directions_, out_);
    run_layers(order.sequence(x, 1, x_.size(2)), y_there.data);
    order.put_sequence(y_there, y);
    order.put_states(h_n, entries, h_out);
    if (cell_ == 0) order.put_states(c_n, entries, c_out);
  }

  int64_t rows() const { return gates_ * hidden_; }

  void same_dtype(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(dtype_of(name, t) == io_, name, " must have the dtype of the weights");
  }
  Tensor kept(const char* name, const Tensor& t, Shape shape, const char* axes) const {
    same_dtype(name, t);
    check_shape(name, t, shape, axes, x_);
    const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % size_of(io_) == 0;
    return aligned ? as_contiguous(t) : torch::stable::clone(t);
  }
  const Direction& direction(int64_t layer, int64_t d) const {
    return weights_[layer * directions_ + d];
  }

  // The two directions' weights are tensors of their own: an entry's stride leads from one to the
  // other, whatever lies between (a whole number of elements, see kept()).
  Rows weight(const Tensor& first, const Tensor& last, int64_t skip = 0) const {
    const auto address = [](const Tensor& t) {
      return reinterpret_cast<intptr_t>(t.const_data_ptr());
    };
    const int64_t apart = (address(last) - address(first)) / size_of(io_);
    const int64_t row = first.dim() == 2 ? first.stride(0) : 0;
    auto* data = static_cast<char*>(data_of(first));
    return Rows{data + skip * size_of(io_), io_, 0, row, apart};
  }
  Rows state(void* data, int64_t layer, int64_t size) const {
    return data == nullptr ? Rows{nullptr, io_, 0, 0, 0} : state_at(data, layer, size);
  }
  Rows state_at(void* data, int64_t layer, int64_t size) const {
    const int64_t entry = batch_ * size;
    char* start = static_cast<char*>(data) + layer * directions_ * entry * size_of(io_);
    return Rows{start, io_, 0, size, entry};
  }

  // One layer on x [T, B, I]; bias: room for it.
  void run_layer(int64_t layer, const Rows& x, int64_t inputs, const Buffer& bias, void* to) const {
    const Direction &first = direction(layer, 0), &last = direction(layer, directions_ - 1);
    const int64_t width = directions_ * out_, folded = cell_ == 1 ? 2 * hidden_ : rows();
    Layer l{steps_, batch_, directions_, hidden_, out_, flags_data_, kReverse};
    AnyForward p;
    p.layer = l, p.relu = relu_;
    p.input = Input{inputs, x, weight(first.w_ih, last.w_ih), {}, places_};
    if (first.b_ih) {
      for (int64_t d = 0; d < directions_; ++d) {
        const Direction& w = direction(layer, d);
        add_biases(data_of(*w.b_ih), data_of(*w.b_hh), io_, rows(), folded, acc_,
                   bias.at(d * rows() * size_of(acc_)));
      }
      p.input.bias = Rows{bias.at(), acc_, 0, 0, rows()};
    }
    p.w_hh = weight(first.w_hh, last.w_hh);
    p.y = Rows{to, io_, places_.apart(batch_) * width, width, out_};
    p.h0 = state(h0_data_, layer, out_), p.h_n = state_at(h_n_, layer, out_);
    if (cell_ == 0) p.c0 = state(c0_data_, layer, hidden_), p.c_n = state_at(c_n_, layer, hidden_);
    if (first.w_hr) p.w_hr = weight(*first.w_hr, *last.w_hr);
    if (cell_ == 1 && first.b_hh) p.b_hn = weight(*first.b_hh, *last.b_hh, 2 * hidden_);
    p.run(cell_, acc_);
  }

  const int64_t cell_;
  const bool relu_;
  const int64_t directions_;
  const Tensor x_;
  MaybeTensor flags_, h0_, c0_;
  std::vector<Direction> weights_;
  int64_t layers_ = 0, steps_ = 0, batch_ = 0, gates_ = 0, hidden_ = 0, out_ = 0;
  DType io_, acc_;
  void *h0_data_ = nullptr, *c0_data_ = nullptr, *h_n_ = nullptr, *c_n_ = nullptr;
  const uint8_t* flags_data_ = nullptr;
  Places places_;
};

std::tuple<Tensor, Tensor, Tensor> layers(const Tensor& x, const MaybeTensor& h0,
                                          const MaybeTensor& c0, std::vector<Tensor> weights,
                                          const MaybeTensor& flags, int64_t cell, bool bias,
                                          bool projected, bool bidirectional, bool relu) {
  return Model(x, h0, c0, weights, flags, cell, bias, projected, bidirectional, relu).run();
}

}  // namespace
}  // namespace fused_rnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("cpu_layers", TORCH_BOX(&fused_rnn::cpu::layers));
}
