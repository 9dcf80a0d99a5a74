"""The edit runtime. The public API is in `iedit.runtime.editor`; what is here costs nothing to import."""

VERSION = "0.1.0"
BACKENDS = ("tensorrt", "onnx", "compile", "torch")  # the ladder of "auto", from the top
METHODS = ("ito", "iedit", "sdedit", "diffedit", "controlnet", "controlnet-diffedit")
