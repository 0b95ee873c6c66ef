"""The benchmark harness: `python -m benchmarks` times fused_rnn, torch.nn and ONNX Runtime."""
