"""The language model's trunk: multi-head latent attention and shortcut-connected mixtures of experts."""

from longcat_model.backbone.backbone import Backbone, BackboneOutput
from longcat_model.backbone.cache import Cache

__all__ = ["Backbone", "BackboneOutput", "Cache"]
