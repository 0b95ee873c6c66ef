"""A character language model, trained with torch.nn's recurrent layers or with fused_rnn's.

    python examples/char_lm.py --impl fused    # some two minutes on two CPU cores
    python examples/char_lm.py --impl nn --cell gru --out runs/gru
    torchrun --nproc-per-node 2 examples/char_lm.py --impl fused

The text is Python's own language reference, which every CPython carries in pydoc_data.topics, or
any file (--text). A character is a byte of its UTF-8 form, so every text has the same alphabet of
256 and a checkpoint fits them all.

Training is truncated backpropagation through time: the text is cut into --batch rows that are read
side by side, --bptt characters a step, and the state is carried from step to step without its
history. A checkpoint is the plain state_dict, with the names torch.nn gives, so one trained with
--impl nn is loaded with --impl fused and the other way round.

The same --seed gives both implementations the same weights and the same batches, and the losses
agree to rounding. With --dropout that is not promised: the masks come from torch's generator in the
order a layer happens to draw them, so it may be two draws of one distribution.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

ALPHABET = 256
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
ARCHITECTURE = {"cell": "lstm", "embed": 64, "hidden": 256, "layers": 2}


class UsageError(Exception):
    """Something the user can mend; shown without a traceback."""


# ---------------------------------------------------------------------------------------- the text


def python_reference():
    """The language reference as one string, each paragraph once (topics quote one another)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "this Python comes without pydoc_data; give a text with --text FILE"
        ) from None
    paragraphs = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            lines = [line.rstrip() for line in paragraph.splitlines()]
            paragraphs["\n".join(lines).strip("\n")] = None
    paragraphs.pop("", None)
    plain = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "—": "--", "–": "-"})
    return "\n\n".join(paragraphs).translate(plain) + "\n"


def read_text(path):
    """The characters of a file, or of the language reference, as a tensor of bytes [N]."""
    try:
        text = Path(path).read_bytes() if path else python_reference().encode()
    except OSError as error:
        raise UsageError(f"cannot read --text {path}: {error.strerror}") from None
    return torch.tensor(list(text), dtype=torch.uint8)


class Rows:
    """A text cut into rows that are read side by side, `bptt` characters a step."""

    def __init__(self, text, rows, bptt, device):
        length = (len(text) - 1) // rows
        if length < bptt:
            raise UsageError(
                f"a part of the text has {len(text)} characters, too few for {rows} rows of "
                f"{bptt}; use a longer text or a smaller --batch or --bptt"
            )
        self.bptt = bptt
        self.steps = length // bptt
        self.inputs = text[: rows * length].view(rows, length).t().long().to(device)  # [L, rows]
        self.targets = text[1 : rows * length + 1].view(rows, length).t().long().to(device)

    def step(self, index, columns=slice(None)):
        """Inputs and targets [bptt, B] of one step; index counts from the beginning of the rows."""
        at = slice(index * self.bptt, (index + 1) * self.bptt)
        return self.inputs[at, columns], self.targets[at, columns]


# --------------------------------------------------------------------------------------- the model


def recurrent_layer(impl, cell):
    """The class LSTM, GRU or RNN of the chosen implementation."""
    if impl == "nn":
        return getattr(nn, cell.upper())
    try:
        import fused_rnn
    except ImportError as error:
        raise UsageError(
            f"--impl fused needs the package fused_rnn ({error}); run `pip install .` in the "
            "project's folder, or use --impl nn"
        ) from None
    return getattr(fused_rnn, cell.upper())


class CharLM(nn.Module):
    """Embedding, stacked recurrent layers, and a linear map to the logits of the next character."""

    def __init__(self, layer, embed, hidden, layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(ALPHABET, embed)
        self.rnn = layer(embed, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, ALPHABET)

    def forward(self, chars, state=None):
        """chars [T, B] -> logits [T, B, 256] and the state after the last step."""
        y, state = self.rnn(self.embedding(chars), state)
        return self.head(self.dropout(y)), state


def detached(state):
    """The same state without its history."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def load_checkpoint(path):
    """The state_dict in a file, and the architecture its shapes tell."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        hidden = weights["rnn.weight_hh_l0"].shape[1]
        gates = weights["rnn.weight_hh_l0"].shape[0] // hidden
        return weights, {
            "cell": {count: cell for cell, count in GATES.items()}[gates],
            "embed": weights["embedding.weight"].shape[1],
            "hidden": hidden,
            "layers": sum(name.startswith("rnn.weight_hh_l") for name in weights),
        }
    except OSError as error:
        raise UsageError(f"cannot read --load {path}: {error.strerror}") from None
    except Exception as error:  # torch.load raises what the bytes happen to provoke
        raise UsageError(f"--load {path} is not a checkpoint of this script: {error}") from None


def build_model(args, device):
    """The model of the arguments on its device; fills in args what the checkpoint decides."""
    weights = None
    defaults = ARCHITECTURE
    if args.load:
        weights, defaults = load_checkpoint(args.load)
    for name, value in defaults.items():
        asked = getattr(args, name)
        if args.load and asked not in (None, value):
            raise UsageError(f"--{name} {asked} contradicts {args.load}, which has {name} {value}")
        setattr(args, name, value if asked is None else asked)
    torch.manual_seed(args.seed)
    layer = recurrent_layer(args.impl, args.cell)
    model = CharLM(layer, args.embed, args.hidden, args.layers, args.dropout)
    if weights is not None:
        model.load_state_dict(weights)
    return model.to(device)


@torch.no_grad()
def validate(model, rows, autocast):
    """Mean loss, in nats a character, over all rows, the state carried along them."""
    model.eval()
    total, state = 0.0, None
    for index in range(rows.steps):
        inputs, targets = rows.step(index)
        with autocast:
            logits, state = model(inputs, state)
        total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).item()
    model.train()
    return total / rows.steps


@torch.no_grad()
def generate(model, prompt, count, temperature, seed, device):
    """The prompt and `count` characters drawn one at a time; temperature 0 takes the likeliest."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt.encode())
    inputs, state = torch.tensor(text, device=device).view(-1, 1), None
    for _ in range(count):
        logits, state = model(inputs, state)
        logits = logits[-1, 0].float().cpu()
        if temperature == 0:
            char = logits.argmax()
        else:
            char = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        text.append(int(char))
        inputs = char.view(1, 1).to(device)
    drawn = bytes(text).decode(errors="replace")
    return "".join(
        c if c.isprintable() or c == "\n" else "�" for c in drawn
    )  # an untrained model draws anything


# -------------------------------------------------------------------------------------- what shows


class Progress:
    """A bar that redraws itself on a terminal, and a line now and then anywhere else."""

    def __init__(self, total, stream, quiet):
        self.total, self.stream, self.quiet = total, stream, quiet
        self.live = stream.isatty()
        self.drawn = 0.0

    def update(self, done, text):
        if self.quiet:
            return
        if self.live:
            now = time.monotonic()
            if now - self.drawn < 0.1 and done < self.total:
                return
            self.drawn = now
            filled = 24 * done // self.total
            self.stream.write(
                f"\r\x1b[K|{'█' * filled}{'·' * (24 - filled)}| {done}/{self.total}  {text}"
            )
        elif done % max(1, self.total // 20) == 0 or done == self.total:
            self.stream.write(f"step {done}/{self.total}  {text}\n")
        self.stream.flush()

    def line(self, text):
        """A line of its own, above the bar."""
        if not self.quiet:
            self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n")
            self.stream.flush()


def describe(loss):
    return f"loss {loss:.4f}  {loss / math.log(2):.3f} bits/char  perplexity {math.exp(loss):.2f}"


def write_log(folder, log):
    """log.json and, where matplotlib is installed, curves.png."""
    folder = Path(folder)
    (folder / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    try:
        import matplotlib
    except ImportError:
        print(
            f"matplotlib is not installed, so there is no curves.png (`pip install matplotlib`); "
            f"the numbers are in {folder / 'log.json'}"
        )
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    train = [loss / math.log(2) for loss in log["train"]]
    axes.plot(range(1, len(train) + 1), train, lw=0.8, alpha=0.6, label="training")
    steps, losses = zip(*log["valid"], strict=True)
    axes.plot(steps, [loss / math.log(2) for loss in losses], "o-", ms=3, label="validation")
    config = log["config"]
    axes.set(
        xlabel="step",
        ylabel="bits per character",
        title="{layers} x {cell}, {hidden} units, --impl {impl}".format(**config),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------- training


def learning_rate(step, steps, warmup):
    """The factor of step `step`: a linear warm-up, then half a cosine down to a twentieth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def train(args, model, train_rows, valid_rows, device, rank, world):
    """Run the steps; returns the losses of every step and of every validation, and the speed."""
    autocast = (
        torch.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()
    )
    stepped = torch.compile(model) if args.compile else model
    if dist.is_initialized():
        stepped = nn.parallel.DistributedDataParallel(stepped)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, args.steps, args.warmup)
    )
    mine = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    progress = Progress(args.steps, sys.stderr, quiet=rank > 0)
    losses, validations, seconds = [], [], 0.0

    def check():
        if rank == 0:
            validations.append((len(losses), validate(model, valid_rows, autocast)))
            progress.line(f"validation after {len(losses)} steps: {describe(validations[-1][1])}")

    check()
    state, start = None, time.perf_counter()
    for step in range(args.steps):
        index = step % train_rows.steps
        state = None if index == 0 else detached(state)
        inputs, targets = train_rows.step(index, mine)
        with autocast:
            logits, state = stepped(inputs, state)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        scheduler.step()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
        if not math.isfinite(losses[-1]):
            raise UsageError(
                f"the loss is {losses[-1]} at step {step + 1}; use a smaller --lr or --clip"
            )

        elapsed = seconds + time.perf_counter() - start
        speed = (step + 1) * inputs.shape[0] * args.batch / elapsed
        progress.update(step + 1, f"{describe(losses[-1])}  {speed:,.0f} chars/s")
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            seconds = elapsed
            check()
            start = time.perf_counter()
    chars = args.steps * args.bptt * args.batch
    return losses, validations, chars / seconds if seconds else None


def pick_device(name):
    """The device of --device; under torchrun each process takes the GPU of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if name == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)


def run(args):
    """One run in one process; returns what goes into log.json."""
    device = pick_device(args.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world:
        raise UsageError(f"--batch {args.batch} must divide evenly among {world} processes")
    if args.save and not Path(args.save).absolute().parent.is_dir():
        raise UsageError(f"--save {args.save}: the folder does not exist")
    if args.out:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {args.out}: {error.strerror}") from None

    text = read_text(args.text)
    cut = len(text) * 9 // 10
    train_rows = Rows(text[:cut], args.batch, args.bptt, device)
    valid_rows = Rows(text[cut:], min(args.batch, 16), args.bptt, device)
    model = build_model(args, device)
    torch.manual_seed(args.seed + rank)  # dropout masks differ from rank to rank

    if rank == 0:
        size = sum(p.numel() for p in model.parameters())
        print(
            f"{args.layers} x {args.cell} of {args.hidden} units, --impl {args.impl}, "
            f"{size:,} parameters, {args.dtype} on {device}\n"
            f"{cut:,} characters to train on, {len(text) - cut:,} to validate"
        )
    if "RANK" in os.environ:
        enough_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        dist.init_process_group("nccl" if device.type == "cuda" and enough_gpus else "gloo")
    try:
        losses, validations, speed = train(args, model, train_rows, valid_rows, device, rank, world)
        log = {
            "config": vars(args),
            "world": world,
            "train": losses,
            "valid": validations,
            "chars_per_second": speed,
        }
        if rank == 0:
            finish(args, model, log, device)
        if dist.is_initialized():
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return log


def finish(args, model, log, device):
    """What is left of a run: the checkpoint, the final numbers, a sample, the log."""
    if args.save:
        torch.save(model.state_dict(), args.save)
        print(f"saved {args.save}")
    print(f"final validation: {describe(log['valid'][-1][1])}")
    if log["chars_per_second"]:
        print(f"trained at {log['chars_per_second']:,.0f} chars/s")
    if args.sample:
        log["sample"] = generate(
            model, args.prompt, args.sample, args.temperature, args.seed, device
        )
        print(f"sample at temperature {args.temperature}:\n\n{log['sample']}")
    if args.out:
        write_log(args.out, log)


def parser():
    def number(kind, low, strict=False):
        def parse(text):
            value = kind(text)
            if not math.isfinite(value) or value < low or (strict and value == low):
                raise argparse.ArgumentTypeError(
                    f"must be {'above' if strict else 'at least'} {low}, not {text}"
                )
            return value

        parse.__name__ = kind.__name__
        return parse

    def probability(text):
        value = float(text)
        if not 0 <= value < 1:
            raise argparse.ArgumentTypeError(f"must lie in [0, 1), not {text}")
        return value

    count, whole, positive = number(int, 1), number(int, 0), number(float, 0, strict=True)
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = p.add_argument_group("model")
    model.add_argument(
        "--impl", choices=["nn", "fused"], default="fused", help="torch.nn or fused_rnn"
    )
    # no defaults here: what is not given comes from the checkpoint, or else from ARCHITECTURE
    keep = {"default": argparse.SUPPRESS}
    model.add_argument(
        "--cell", choices=list(GATES), help="(default: lstm, or the checkpoint's)", **keep
    )
    model.add_argument("--embed", type=count, help="size of the embedding (default: 64)", **keep)
    model.add_argument("--hidden", type=count, help="units of a layer (default: 256)", **keep)
    model.add_argument("--layers", type=count, help="recurrent layers (default: 2)", **keep)
    model.add_argument(
        "--dropout", type=probability, default=0.0, help="after every recurrent layer"
    )
    model.add_argument("--load", metavar="FILE", help="start from this checkpoint")
    model.add_argument("--save", metavar="FILE", help="write the state_dict here at the end")

    data = p.add_argument_group("text")
    data.add_argument(
        "--text", metavar="FILE", help="train on this file instead of Python's reference"
    )
    data.add_argument(
        "--batch", type=count, default=16, help="rows read side by side, over all processes"
    )
    data.add_argument("--bptt", type=count, default=64, help="characters a step")

    training = p.add_argument_group("training")
    training.add_argument("--steps", type=whole, default=2400, help="0 only validates and samples")
    training.add_argument("--lr", type=positive, default=5e-3, help="peak learning rate of Adam")
    training.add_argument("--warmup", type=whole, default=20, help="steps of linear warm-up")
    training.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    training.add_argument(
        "--eval-every", type=count, default=200, metavar="STEPS", help="between validations"
    )
    training.add_argument("--seed", type=whole, default=0)
    training.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    training.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="bfloat16: under torch.autocast",
    )
    training.add_argument("--compile", action="store_true", help="train through torch.compile")
    training.add_argument("--out", metavar="DIR", help="write log.json and curves.png here")

    sample = p.add_argument_group("sample")
    sample.add_argument(
        "--sample", type=whole, default=400, metavar="CHARS", help="characters to draw at the end"
    )
    sample.add_argument(
        "--temperature", type=number(float, 0), default=0.7, help="0 takes the likeliest"
    )
    sample.add_argument("--prompt", default="The ", help="what the sample begins with")
    return p


def main(argv=None):
    """Parse the arguments and run; returns the log."""
    p = parser()
    args = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(ARCHITECTURE)))
    if not args.prompt:
        p.error("--prompt must have at least one character")
    try:
        return run(args)
    except UsageError as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
