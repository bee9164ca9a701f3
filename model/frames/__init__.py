"""Models that take more than arrays of numbers: data frames, categories, dates, and those of the boosters.

A fitted model does not record what its columns hold. Here it is read from the encoders and imputers inside it
(`parts`), or from what other libraries keep (`foreign`), else tried out, or taken from a sample (`inference`); what it
gets of JSON then has to be what it was fitted on (`checks`), or it is refused. The core calls these functions if the
room is there; without it only models are served that certainly take numbers or texts, or that say what they take.
"""

from .foreign import servable
from .inference import candidates, complete, explain

__all__ = ["candidates", "complete", "explain", "servable"]
