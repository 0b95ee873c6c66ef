"""The operators ``fused_rnn::triton_*``: schemas fused_rnn/ops.py's, meanings docs/design.md's."""

from fused_rnn.plan import on
from fused_rnn.triton import block, tiles_gru, tiles_lstm, tiles_rnn
from fused_rnn.triton.arguments import (
    check,
    layer_of,
    pad,
    padded,
    sequence_of,
    state_of,
    tape_of,
    weights_of,
    whole_stack,
)
from fused_rnn.triton.launch import TL_DTYPE, Call, halves, operand
from fused_rnn.triton.matrix_product import matrix_product


def _lstm(gates_x, w_hh, w_hr, h0, c0, flags, reverse, keep_cells, keep_gates):
    """(y, h_n, c_n, cells, gates) of the LSTM's forward scan; the last two empty where not kept."""
    layer = layer_of("gates_x", gates_x, w_hh, 4, w_hr is None, flags, reverse)
    T, B, S, H, P = layer[:5]
    x = sequence_of(layer, "gates_x", gates_x, 4 * H, "[T, B, S, 4H]")
    weights_of(layer, "w_hh", w_hh, (S, 4 * H, P), "[S, 4H, P]")
    weights_of(layer, "w_hr", w_hr, (S, P, H), "[S, P, H]")
    h0 = state_of(layer, "h0", h0, P, "[S, B, P]")
    c0 = state_of(layer, "c0", c0, H, "[S, B, H]")
    y, h_n = layer.empty(T, B, S, P, dtype=layer.io), layer.empty(S, B, P, dtype=h0.dtype)
    c_n = layer.empty(S, B, H)
    cells = layer.empty(T if keep_cells else 0, B, S, H)
    gates = layer.empty(T, B, S, 4 * H if keep_gates else 0)
    outputs = y, h_n, c_n, cells, gates
    call = Call(layer, "lstm", proj=w_hr is not None)
    if B == 0 or S == 0:
        return outputs
    # A tensor that is not kept is not written, but has to be there.
    tape = (cells if keep_cells else c_n, gates if keep_gates else c_n)
    keep = (int(keep_cells), int(keep_gates))
    with on(layer.device):
        if call.is_block:
            args = (*x, pad(w_hh), h0, c0, *layer.flags, y, h_n, c_n, *tape, *keep)
            call.block(block.lstm_forward_block, args)
            return outputs
        hs = halves(layer, h0, P)
        c_n.copy_(c0)
        m = hs if w_hr is None else operand(layer, H)
        args = (*x, pad(w_hh), hs, c_n, *layer.flags, y, *tape, m, *keep)
        sizes = (H, padded(P), padded(H))
        step = call.steps(tiles_lstm.lstm_forward_tiles, H, args, sizes, (w_hr is not None,))
        if w_hr is None:
            call.scan(step, T)
        else:
            args = (pad(w_hr), m, hs, *layer.flags, y)
            sizes = (P, padded(H), padded(P))
            acc = (TL_DTYPE[layer.acc],)
            project = call.steps(tiles_lstm.lstm_project_tiles, P, args, sizes, acc, loops=False)
            for p in range(T):
                step(p)
                project(p)
        h_n.copy_(hs[T % 2, ..., :P])
    return outputs


@whole_stack("lstm_forward")
def lstm_forward(gates_x, w_hh, w_hr, h0, c0, flags, reverse, keep_gates):
    return _lstm(gates_x, w_hh, w_hr, h0, c0, flags, reverse, True, keep_gates)


@whole_stack("lstm_inference")
def lstm_inference(gates_x, w_hh, w_hr, h0, c0, flags, reverse):
    return _lstm(gates_x, w_hh, w_hr, h0, c0, flags, reverse, False, False)[:3]


@whole_stack("lstm_backward")
def lstm_backward(dy, dh_n, dc_n, dcells, w_hh, w_hr, c0, cells, gates, flags, reverse):
    layer = layer_of("cells", cells, w_hh, 4, w_hr is None, flags, reverse)
    T, B, S, H, P = layer[:5]
    dy = sequence_of(layer, "dy", dy, P, "[T, B, S, P]")
    dh_n = state_of(layer, "dh_n", dh_n, P, "[S, B, P]")
    dc_n = state_of(layer, "dc_n", dc_n, H, "[S, B, H]")
    dcells = sequence_of(layer, "dcells", dcells, H, "[T, B, S, H]")
    weights_of(layer, "w_hh", w_hh, (S, 4 * H, P), "[S, 4H, P]")
    weights_of(layer, "w_hr", w_hr, (S, P, H), "[S, P, H]")
    c0 = state_of(layer, "c0", c0, H, "[S, B, H]")
    cells = tape_of(layer, "cells", cells, H, "[T, B, S, H]")
    gates = tape_of(layer, "gates", gates, 4 * H, "[T, B, S, 4H]")
    projected = w_hr is not None
    dgates, dh_all = layer.empty(T, B, S, 4 * H), layer.empty(T, B, S, P if projected else 0)
    dh0, dc0 = layer.empty(S, B, P), layer.empty(S, B, H)
    outputs = dgates, dh0, dc0, dh_all
    call = Call(layer, "lstm", proj=projected, backward=True)
    if B == 0 or S == 0:
        return outputs
    tape = (c0, cells, gates, *layer.flags)
    with on(layer.device):
        if call.is_block:
            args = (*dy, dh_n, dc_n, *dcells, pad(w_hh), *tape, dgates, dh0, dc0)
            call.block(block.lstm_backward_block, args)
            return outputs
        dh0.copy_(dh_n)
        dc0.copy_(dc_n)
        ds, w = halves(layer, None, 4 * H), pad(w_hh.mT)
        dh = operand(layer, P) if projected else ds
        args = (*dy, *dcells, pad(w_hr.mT) if projected else w, ds, *tape, dgates, dh0, dh, dc0)
        sizes = (H, padded(P), padded(4 * H))
        step = call.steps(tiles_lstm.lstm_backward_tiles, H, args, sizes, (projected,))
        if not projected:
            call.scan(step, T + 1)
            return outputs
        args = (*dy, w, ds, *layer.flags, dh_all, dh0, dh)
        sizes = (P, padded(P), padded(4 * H))
        kernel = tiles_lstm.lstm_backward_project_tiles
        unproject = call.steps(kernel, P, args, sizes, loops=False)
        for q in range(T + 1):
            unproject(q)
            step(q)
    return outputs


def _gru(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, keep_gates):
    """(y, h_n, gates) of the GRU's forward scan; gates empty where not kept."""
    layer = layer_of("gates_x", gates_x, w_hh, 3, True, flags, reverse)
    T, B, S, H, _ = layer[:5]
    check(reset_after or b_hn is None, "b_hn must be None with reset_after=False")
    x = sequence_of(layer, "gates_x", gates_x, 3 * H, "[T, B, S, 3H]")
    weights_of(layer, "w_hh", w_hh, (S, 3 * H, H), "[S, 3H, H]")
    weights_of(layer, "b_hn", b_hn, (S, H), "[S, H]")
    h0 = state_of(layer, "h0", h0, H, "[S, B, H]")
    y, h_n = layer.empty(T, B, S, H, dtype=layer.io), layer.empty(S, B, H, dtype=h0.dtype)
    gates = layer.empty(T, B, S, (4 if reset_after else 3) * H if keep_gates else 0)
    outputs = y, h_n, gates
    call = Call(layer, "gru", reset_after=reset_after)
    if B == 0 or S == 0:
        return outputs
    has_bias = b_hn is not None
    w_hh = pad(w_hh)
    b_hn = b_hn.contiguous() if has_bias else w_hh
    with on(layer.device):
        state = layer.empty(S, B, H)
        tape, keep = gates if keep_gates else state, int(keep_gates)
        if call.is_block:
            args = (*x, w_hh, b_hn, h0, *layer.flags, y, h_n, tape, keep)
            constants = (TL_DTYPE[layer.acc], has_bias, reset_after)
            call.block(block.gru_forward_block, args, constants)
            return outputs
        hs = halves(layer, h0, H)
        state.copy_(h0)
        sizes = (H, padded(H))
        if reset_after:
            args = (*x, w_hh, b_hn, hs, state, *layer.flags, y, tape, keep)
            step = call.steps(tiles_gru.gru_forward_tiles, H, args, sizes, (has_bias,))
            call.scan(step, T)
        else:
            rh, z = operand(layer, H), layer.empty(S, B, H)
            common = (*x, w_hh, hs, state, *layer.flags)
            args = (*common, tape, rh, z, keep)
            first = call.steps(tiles_gru.gru_before_gates_tiles, H, args, sizes, loops=False)
            args = (*common, y, tape, rh, z, keep)
            second = call.steps(tiles_gru.gru_before_candidate_tiles, H, args, sizes, loops=False)
            for p in range(T):
                first(p)
                second(p)
        h_n.copy_(state)
    return outputs


@whole_stack("gru_forward")
def gru_forward(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, keep_gates):
    return _gru(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, keep_gates)


@whole_stack("gru_inference")
def gru_inference(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after):
    return _gru(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, False)[:2]


@whole_stack("gru_backward")
def gru_backward(dy, dh_n, w_hh, h0, y, gates, flags, reverse, reset_after):
    layer = layer_of("y", y, w_hh, 3, True, flags, reverse)
    T, B, S, H, _ = layer[:5]
    dy = sequence_of(layer, "dy", dy, H, "[T, B, S, H]")
    dh_n = state_of(layer, "dh_n", dh_n, H, "[S, B, H]")
    weights_of(layer, "w_hh", w_hh, (S, 3 * H, H), "[S, 3H, H]")
    h0 = state_of(layer, "h0", h0, H, "[S, B, H]")
    y = tape_of(layer, "y", y, H, "[T, B, S, H]")
    kept, axes = (4, "[T, B, S, 4H]") if reset_after else (3, "[T, B, S, 3H]")
    gates = tape_of(layer, "gates", gates, kept * H, axes)
    dgates, dgates_hn = layer.empty(T, B, S, 3 * H), layer.empty(T, B, S, H if reset_after else 0)
    dh0 = layer.empty(S, B, H)
    outputs = dgates, dgates_hn, dh0
    call = Call(layer, "gru", reset_after=reset_after, backward=True)
    if B == 0 or S == 0:
        return outputs
    tape = (h0, y, gates, *layer.flags)
    with on(layer.device):
        if call.is_block:
            hn = dgates_hn if reset_after else dgates  # not written, but has to be there
            args = (*dy, dh_n, pad(w_hh), *tape, dgates, hn, dh0)
            call.block(block.gru_backward_block, args, (reset_after,))
            return outputs
        dh0.copy_(dh_n)
        if reset_after:
            ds = halves(layer, None, 3 * H)
            args = (*dy, pad(w_hh.mT), ds, *tape, dgates, dgates_hn, dh0)
            step = call.steps(tiles_gru.gru_backward_tiles, H, args, (H, padded(3 * H)))
            call.scan(step, T + 1)
            return outputs
        ds, dn = halves(layer, None, 2 * H), operand(layer, H)
        w_rz, w_n = pad(w_hh[:, : 2 * H].mT), pad(w_hh[:, 2 * H :].mT)
        sizes = (H, padded(2 * H), padded(H))
        args = (*dy, w_rz, ds, *tape, dgates, dn, dh0)
        kernel = tiles_gru.gru_before_backward_candidate_tiles
        first = call.steps(kernel, H, args, sizes, loops=False)
        args = (w_n, ds, dn, *tape, dgates, dh0)
        kernel = tiles_gru.gru_before_backward_reset_tiles
        second = call.steps(kernel, H, args, sizes, loops=False)
        for q in range(T):
            first(q)
            second(q)
        first(T)
    return outputs


@whole_stack("rnn_forward")
def rnn_forward(gates_x, w_hh, h0, flags, reverse, relu):
    layer = layer_of("gates_x", gates_x, w_hh, 1, True, flags, reverse)
    T, B, S, H, _ = layer[:5]
    x = sequence_of(layer, "gates_x", gates_x, H, "[T, B, S, H]")
    weights_of(layer, "w_hh", w_hh, (S, H, H), "[S, H, H]")
    h0 = state_of(layer, "h0", h0, H, "[S, B, H]")
    y, h_n = layer.empty(T, B, S, H, dtype=layer.io), layer.empty(S, B, H, dtype=h0.dtype)
    call = Call(layer, "rnn")
    if B == 0 or S == 0:
        return y, h_n
    with on(layer.device):
        if call.is_block:
            args = (*x, pad(w_hh), h0, *layer.flags, y, h_n, int(relu))
            call.block(block.rnn_forward_block, args, (TL_DTYPE[layer.acc],))
            return y, h_n
        hs = halves(layer, h0, H, layer.acc)
        args = (*x, pad(w_hh), hs, *layer.flags, y, int(relu))
        step = call.steps(tiles_rnn.rnn_forward_tiles, H, args, (H, padded(H)))
        call.scan(step, T)
        h_n.copy_(hs[T % 2, ..., :H])
    return y, h_n


@whole_stack("rnn_backward")
def rnn_backward(dy, dh_n, w_hh, y, flags, reverse, relu):
    layer = layer_of("y", y, w_hh, 1, True, flags, reverse)
    T, B, S, H, _ = layer[:5]
    dy = sequence_of(layer, "dy", dy, H, "[T, B, S, H]")
    dh_n = state_of(layer, "dh_n", dh_n, H, "[S, B, H]")
    weights_of(layer, "w_hh", w_hh, (S, H, H), "[S, H, H]")
    y = tape_of(layer, "y", y, H, "[T, B, S, H]")
    dgates, dh0 = layer.empty(T, B, S, H), layer.empty(S, B, H)
    call = Call(layer, "rnn", backward=True)
    if B == 0 or S == 0:
        return dgates, dh0
    with on(layer.device):
        if call.is_block:
            args = (*dy, dh_n, pad(w_hh), y, *layer.flags, dgates, dh0, int(relu))
            call.block(block.rnn_backward_block, args)
            return dgates, dh0
        dh0.copy_(dh_n)
        ds = halves(layer, None, H)
        args = (*dy, pad(w_hh.mT), ds, y, *layer.flags, dgates, dh0, int(relu))
        step = call.steps(tiles_rnn.rnn_backward_tiles, H, args, (H, padded(H)))
        call.scan(step, T + 1)
    return dgates, dh0


IMPLEMENTATIONS = {
    "lstm_forward": lstm_forward,
    "lstm_inference": lstm_inference,
    "lstm_backward": lstm_backward,
    "gru_forward": gru_forward,
    "gru_inference": gru_inference,
    "gru_backward": gru_backward,
    "rnn_forward": rnn_forward,
    "rnn_backward": rnn_backward,
    "matmul": matrix_product,
}
