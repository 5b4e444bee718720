"""A model behind HTTP: texts of a GPT, classes of a BERT, requests that come together computed together.

app = create_app(*open_model("runs/stdlib"))  # an ASGI app, as `fastlm serve` runs it
"""

from .app import create_app
from .batching import Limits

__all__ = ["Limits", "create_app"]
