"""The multimodal network: encoders -> (projectors) -> fusion -> heads, for any number of modalities.

Absent modalities: a modality without an entry in `x` is absent from the whole batch, one with `present` False is
absent from that sample. Neither is ever read. Their half of the fusion is zero, or, behind two projectors, the
mean infiltration feature of what the sample does have (FedCMI's stand-in: out = F([z_S^1; z_I^1])). Late fusion has
no joint head: out is the mean of the own heads' logits over the present modalities. Boosted heads (AUG) stand in
place of the linear own heads, and then head.joint is the last layer that they share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmm import seeding
from fedmm.config.schema import ModelConfig
from fedmm.errors import ConfigError
from fedmm.models.blocks import block_of
from fedmm.models.boosted import BoostedHead
from fedmm.models.encoders import build_encoder
from fedmm.models.fusion import FUSIONS
from fedmm.models.projectors import two_projectors
from fedmm.types import ModalitySpec, Outputs, Presence, Tensors


class MultimodalModel(nn.Module):
    """One encoder a modality, optional two-projector modules, a fusion and linear heads.

    Args:
        specs: Modality -> spec, in slot order. Names must not contain a dot (they are part of block names).
        classes: Number of classes C.
        config: Shapes and switches.

    Raises:
        ConfigError: Unknown encoder, unreadable shape, or an unusable modality name.
    """

    def __init__(self, specs: dict[str, ModalitySpec], classes: int, config: ModelConfig) -> None:
        super().__init__()
        for m in specs:
            if "." in m or m == "joint" or not m:
                raise ConfigError(f'"{m}" cannot name a modality', where="data", remedy='avoid dots and "joint"')
        self.modalities = tuple(specs)
        d = config.features
        names = config.encoder if isinstance(config.encoder, dict) else dict.fromkeys(specs, config.encoder)
        if unknown := set(names) - set(specs):
            raise ConfigError(
                f"no such modality: {', '.join(sorted(unknown))}",
                where="model.encoder",
                remedy=f"choose from: {', '.join(specs)}",
            )
        self.encoder = nn.ModuleDict(
            {m: build_encoder(names.get(m, "auto"), spec, d, config.width, config.norm) for m, spec in specs.items()}
        )
        self.fill = config.projector.fill if config.projector else "zero"
        self.projector = nn.ModuleDict(
            {m: two_projectors(d, config.projector.depth, config.projector.hidden) for m in specs}
            if config.projector
            else {}
        )
        self.fusion: nn.Module = nn.Identity()
        self.head = nn.ModuleDict()
        self.late = config.fusion == "late"
        self.boosting = config.boosting
        if config.fusion != "late":
            fusion = FUSIONS[config.fusion](self.modalities, d)
            self.fusion = fusion
            self.head["joint"] = nn.Linear(fusion.width, classes)
        if config.boosting:
            self.head["joint"] = nn.Linear(config.boosting.hidden, classes)
            self.head.update({m: BoostedHead(d, config.boosting.hidden, config.boosting.slots) for m in specs})
        elif config.unimodal_heads or config.fusion == "late":
            self.head.update({m: nn.Linear(d, classes) for m in specs})

    def encode(self, x: Tensors, present: Tensors) -> Tensors:
        """h^m = phi^m(x^m) [..., B, d] of each modality in `x`; zero in rows where it is absent."""
        features = {}
        whole = present.whole if isinstance(present, Presence) else frozenset[str]()
        for m in x:
            if m in whole:
                features[m] = self.encoder[m](x[m])
                continue
            here = present[m]
            row = here.reshape(*here.shape, *[1] * (x[m].dim() - here.dim()))
            h = self.encoder[m](torch.where(row, x[m], 0.0))
            features[m] = torch.where(here.unsqueeze(-1), h, 0.0)
        return features

    def decide(self, features: Tensors, present: Tensors, *, own_alone: bool = False) -> Outputs:
        """Fused and own-head logits [..., B, C] from encoder features; modalities without features count as absent.

        Args:
            features: Of the modalities that there are.
            present: Which samples have each.
            own_alone: Leave fused and infiltration logits empty.
        """
        mask, everywhere = self._masks(features, present)
        own = self._project("self", features, {} if everywhere else mask)
        heads = self._judge(own)
        if own_alone:
            return Outputs(next(iter(features.values())).new_empty(0), features, heads)
        infiltration = self._project("infiltration", features, {} if everywhere else mask) if self.projector else {}
        logits = self._mean(heads, mask) if self.late else self.head["joint"](self._fuse(own, infiltration, mask))
        return Outputs(logits, features, heads, self._judge(infiltration))

    def forward(self, x: Tensors, present: Tensors, *, own_alone: bool = False) -> Outputs:
        """Logits and features of a batch; see `Batch` for shapes and `decide` for `own_alone`."""
        return self.decide(self.encode(x, present), present, own_alone=own_alone)

    def _project(self, which: str, features: Tensors, mask: Tensors) -> Tensors:
        """Behind one of the two projectors, zero by `mask`, if any; without projectors, the features themselves."""
        if not self.projector:
            return dict(features)
        z = {m: cast(nn.ModuleDict, self.projector[m])[which](h) for m, h in features.items()}
        return {m: mask[m] * each for m, each in z.items()} if mask else z

    def _judge(self, z: Tensors) -> Tensors:
        """Logits of own heads, of the modalities that have one."""
        return {m: self._own(m, each) for m, each in z.items() if m in self.head}

    def _masks(self, features: Tensors, present: Tensors) -> tuple[Tensors, bool]:
        """Presence [..., B, 1] of each modality that has features, and whether no sample lacks one: then ones [1]."""
        some = next(iter(features.values()))
        if isinstance(present, Presence) and present.whole.issuperset(features):
            return dict.fromkeys(features, some.new_ones(1)), True
        return {m: present[m].unsqueeze(-1).to(h.dtype) for m, h in features.items()}, False

    def _own(self, modality: str, z: Tensor) -> Tensor:
        head = self.head[modality]
        return cast(Tensor, head(z, self.head["joint"]) if isinstance(head, BoostedHead) else head(z))

    def _mean(self, heads: Tensors, mask: Tensors) -> Tensor:
        probabilities = self.boosting is not None and self.boosting.fuse == "probabilities"
        votes = {m: F.softmax(o, -1) if probabilities else o for m, o in heads.items()}
        total = torch.stack([mask[m] * v for m, v in votes.items()]).sum(0)
        mean = total / torch.stack(list(mask.values())).sum(0).clamp(min=1)
        return mean.clamp(min=1e-12).log() if probabilities else mean

    def _fuse(self, own: Tensors, infiltration: Tensors, mask: Tensors) -> Tensor:
        parts = own
        if len(own) < len(self.modalities):
            some = next(iter(own.values()))
            nothing, absent = torch.zeros_like(some), torch.zeros_like(some[..., :1])
            parts = {m: own.get(m, nothing) for m in self.modalities}
            mask = {m: mask.get(m, absent) for m in self.modalities}
        # A client that owns everything has no hole to fill unless single samples lack something: then the
        # masks below decide, so that no branch depends on data.
        if infiltration and self.fill == "infiltration":
            count = torch.stack([mask[m] for m in infiltration]).sum(0).clamp(min=1)
            stand_in = torch.stack(list(infiltration.values())).sum(0) / count
            parts = {m: z + (1 - mask[m]) * stand_in for m, z in parts.items()}
            mask = dict.fromkeys(mask, stand_in.new_ones(1))
        return cast(Tensor, self.fusion(parts, mask))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: measuring must neither use nor record the statistics of a batch."""
    training = model.training
    # Setting a mode goes through every module, and a stack's twin has no other.
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def build_model(specs: dict[str, ModalitySpec], classes: int, config: ModelConfig, seed: int) -> MultimodalModel:
    """A model whose every tensor is drawn from its own stream, so that equal blocks start equal in any model.

    Kaiming-normal (fan-out) convolutions, Xavier-normal linear layers, zero biases, unit norms (the papers'
    initialisation).
    """
    with torch.random.fork_rng(devices=[]):  # torch's own draws are overwritten below and leave no trace
        model = MultimodalModel(specs, classes, config)
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            generator = seeding.torch_rng(seed, f"init/{path}")
            with torch.no_grad():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
                else:
                    nn.init.xavier_normal_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    for name in model.state_dict():
        block_of(name)
    return model
