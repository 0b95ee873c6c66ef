"""ONNX models of torch.nn layers, built from onnx.helper nodes, and their runner.

Gate orders: torch LSTM i f g o -> ONNX i o f c; torch GRU r z n -> ONNX z r h, where torch's bias
inside the reset product is linear_before_reset=1. ONNX keeps both biases in one row, B = [Wb, Rb].
"""

import contextlib

import torch

from benchmarks.problem import ROTATED_INPUTS

# onnx gate k is torch gate ORDER[cell][k]
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
OPSET, IR = 17, 10


def reorder(weight, cell):
    """Torch's [G*H, ...] in ONNX's gate order."""
    gates = weight.unflatten(0, (len(ORDER[cell]), -1))
    return gates[list(ORDER[cell])].flatten(0, 1)


def layer_weights(module, cell, layer):
    """W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] of one layer, as float32 numpy arrays."""
    suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: 2 if module.bidirectional else 1]

    def get(kind, suffix):
        return reorder(getattr(module, f"{kind}{suffix}").detach().float(), cell)

    def stack(kind):
        return torch.stack([get(kind, suffix) for suffix in suffixes]).numpy()

    biases = torch.stack(
        [torch.cat([get("bias_ih", suffix), get("bias_hh", suffix)]) for suffix in suffixes]
    )
    return stack("weight_ih"), stack("weight_hh"), biases.numpy()


def build(module, cell, T, B, with_lengths=False, with_state=False):
    """A serialized model.

    Inputs x [T, B, I], lengths [B], h0_l* and c0_l* [D, B, H]; outputs y [T, B, D*H], h_l*, c_l*.
    """
    from onnx import TensorProto, helper, numpy_helper

    H, D = module.hidden_size, 2 if module.bidirectional else 1
    states = ("h", "c") if cell == "LSTM" else ("h",)

    def real(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs, outputs, nodes = [real("x", T, B, module.input_size)], [], []
    constants = [("shape", torch.tensor([T, B, D * H]).numpy())]
    if with_lengths:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, (B,)))
    below = "x"
    for layer in range(module.num_layers):
        for name, array in zip("WRB", layer_weights(module, cell, layer), strict=True):
            constants.append((f"{name}{layer}", array))
        given = [f"{s}0_l{layer}" for s in states] if with_state else []
        final = [f"{s}_l{layer}" for s in states]
        inputs += [real(name, D, B, H) for name in given]
        outputs += [real(name, D, B, H) for name in final]
        options = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
        if cell == "GRU":
            options["linear_before_reset"] = 1
        if cell == "RNN":
            options["activations"] = [module.nonlinearity.capitalize()] * D
        arguments = [below, f"W{layer}", f"R{layer}", f"B{layer}"]
        arguments += ["lengths" if with_lengths else "", *given]
        top = "y" if layer == module.num_layers - 1 else f"y{layer}"
        # ONNX gives Y as [T, D, B, H]; the next layer wants [T, B, D*H].
        nodes += [
            helper.make_node(cell, arguments, [f"Y{layer}", *final], **options),
            helper.make_node("Transpose", [f"Y{layer}"], [f"Yt{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"Yt{layer}", "shape"], [top]),
        ]
        below = top
    graph = helper.make_graph(
        nodes,
        cell,
        inputs,
        [real("y", T, B, D * H), *outputs],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    return model.SerializeToString()


class OnnxRunner:
    """A session over the problem; inputs are turned into numpy arrays outside the clock."""

    training = False

    def __init__(self, problem, threads):
        import onnxruntime

        case, cell = problem.job.case, problem.job.cell
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Its threads go on spinning for work when a run is over, and would take a core from whoever
        # is timed next. (During a run they spin as ever.)
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = build(
            problem.module,
            cell,
            case.T,
            case.B,
            with_lengths=problem.lengths is not None,
            with_state=problem.hx is not None,
        )
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.problem, self.device = problem, problem.device
        self.feeds = [self._feed(x) for x in problem.xs]

    def _feed(self, x):
        problem, case = self.problem, self.problem.job.case
        feed = {"x": x.numpy()}
        if problem.lengths is not None:
            feed["lengths"] = problem.lengths.int().numpy()
        hx = problem.hx if isinstance(problem.hx, tuple) else (problem.hx,)
        for kind, state in zip("hc", () if problem.hx is None else hx, strict=False):
            for layer, part in enumerate(state.chunk(case.layers)):
                feed[f"{kind}0_l{layer}"] = part.numpy()
        return feed

    def context(self):
        return contextlib.nullcontext()

    def call(self, index):
        return self.session.run(None, self.feeds[index % ROTATED_INPUTS])

    def clear(self):
        pass

    def results(self):
        """Outputs by torch's names: y, h_n [L*D, B, H], c_n."""
        names = [output.name for output in self.session.get_outputs()]
        values = {n: torch.from_numpy(v) for n, v in zip(names, self.call(0), strict=True)}
        results = {"y": values["y"]}
        for kind in "hc":
            layers = [value for name, value in values.items() if name.startswith(f"{kind}_l")]
            if layers:
                results[f"{kind}_n"] = torch.cat(layers)
        return results
