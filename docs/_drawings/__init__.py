"""The drawings of the pages: each is a function without arguments that returns a figure."""

from __future__ import annotations

from . import flow, geometry, selection, studies, walk

DRAWINGS = {
    function.__name__: function
    for module in (flow, geometry, selection, studies, walk)
    for function in module.ALL
}
