"""Multimodal models and the block contract that names their parameters."""

from fedmm.models.blocks import block_of, blocks_of, bytes_per_block, modality_of, serves
from fedmm.models.multimodal import MultimodalModel, build_model

__all__ = ["MultimodalModel", "block_of", "blocks_of", "build_model", "bytes_per_block", "modality_of", "serves"]
