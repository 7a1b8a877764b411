"""Surgery on a model's own module tree: another norm in the place of each selected one."""

from normsurgery.surgery.keymap import KeyMap
from normsurgery.surgery.rebuilding import rebuild, restore_originals, restore_rewrites
from normsurgery.surgery.swapping import survey_for, swap

__all__ = ["KeyMap", "rebuild", "restore_originals", "restore_rewrites", "survey_for", "swap"]
