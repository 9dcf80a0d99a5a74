"""The edit runtime. The public API is in `iedit.runtime.editor`; what is here costs nothing to import."""

VERSION = "0.1.0"
METHODS = ("ito", "iedit", "sdedit", "diffedit", "controlnet", "controlnet-diffedit")
