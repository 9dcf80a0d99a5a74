"""The edit runtime. The public API is in `iedit.runtime.editor`; what is here costs nothing to import."""

VERSION = "0.1.0"
BACKENDS = ("tensorrt", "onnx", "compile", "graphs", "torch")  # in the order in which "auto" tries them
METHODS = ("ito", "iedit", "sdedit", "diffedit", "controlnet", "controlnet-diffedit", "p2p", "ddpm", "ip2p")
