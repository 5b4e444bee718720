"""Makes what is made of the documentation: the API reference, and the table of ops and backends in the READMEs.

python docs/build.py [FOLDER]      HTML from the docstrings, in FOLDER (build/docs); updates the table
python docs/build.py --table       prints the table
"""

from __future__ import annotations

import html
import importlib
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # with it Triton's kernels serve the CPU too

import pdoc
import torch

from fastlm.models import Packing
from fastlm.ops import registry

ROOT = Path(__file__).parents[1]
MODULES = (
    "fastlm", "fastlm.functional", "fastlm.nn", "fastlm.models", "fastlm.train", "fastlm.data", "fastlm.generation",
    "fastlm.accelerate",
)  # fmt: skip
READMES = ("README.md", "README.zh-CN.md")
MARKS = ("<!-- ops and backends: `make docs` writes this -->\n\n", "\n\n<!-- end -->")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def table() -> str:
    """Ops by backends as they are registered, in Markdown: the same on every machine, whatever was built there.

    Returns:
        For each op the dtypes that each of its backends serves, and above them on which devices.
    """
    ops = registry.OPS.values()
    names = {name for op in ops for name in op.backends}
    order = [name for name in registry.KNOWN_NAMES if name in names]
    order += sorted(names - set(order))
    devices = [
        " ".join(sorted({each for op in ops if name in op.backends for each in op.backends[name].devices or ("any",)}))
        for name in order
    ]
    rows = [["op", *(f"`{name}`" for name in order)], ["---"] * (len(order) + 1), ["device", *devices]]
    rows += [[f"`{op.name}`", *(dtypes(op.backends.get(name)) for name in order)] for op in ops]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def dtypes(backend: registry.Backend | None) -> str:
    """Those that a backend serves; "-" where there is no backend."""
    if backend is None:
        return "-"
    if not backend.dtypes <= DTYPES.keys():
        return "all"
    return " ".join(name for dtype, name in DTYPES.items() if dtype in backend.dtypes)


def update_tables() -> None:
    """Puts the table between the marks in each README."""
    for name in READMES:
        before, rest = (ROOT / name).read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        (ROOT / name).write_text(before + MARKS[0] + table() + MARKS[1] + after, encoding="utf-8")


def build(folder: Path) -> None:
    """Writes the reference, one page for each of MODULES, and `index.html`, which lists them."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    for module in modules.values():  # pdoc does not ask a module's own __getattr__
        vars(module).update({each: getattr(module, each) for each in getattr(module, "__all__", ())})
    # pdoc looks for a named tuple's annotations where the tuple is exported, not where it is defined.
    Packing.__new__.__annotations__ |= {"indices_N": torch.Tensor, "cu_seqlens": torch.Tensor, "max_seqlen": int}
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc("fastlm", r"!fastlm\.", *MODULES[1:], output_directory=folder)
    items = [
        f'<li><a href="{name.replace(".", "/")}.html">{name}</a>: {html.escape(module.__doc__.splitlines()[0])}</li>'
        for name, module in modules.items()
    ]
    page = f'<!doctype html><meta charset="utf-8"><title>FastLM</title><h1>FastLM</h1><ul>{"".join(items)}</ul>'
    (folder / "index.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print(table())
    else:
        folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "docs"
        build(folder)
        update_tables()
        print(folder / "index.html")
