"""Physical model surgery for PyTorch vision networks: smaller tensors, verified, measured in ONNX Runtime.

    import surgery
    result = surgery.shrink(model, example_inputs, budget=surgery.Budget(macs=0.5))
    result.model                        # the compact nn.Module, trainable
    surgery.save(result, "shrunk/net")  # ONNX files, weights, plan and report with measured times

The public names are listed in `__init__.pyi` and loaded on first use: `import surgery` alone imports neither torch nor
any stage.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
