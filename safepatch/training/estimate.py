"""How much a training step would hold at once, counted on meta tensors: nothing is computed, no weight is read.

The step is the real one, `patched_prediction` and its backward pass with the host's and the patch's own checkpointing;
a mode beside it adds up what is alive. Two things that only a GPU does are put in: attention that keeps queries, keys,
values and its output (Rabe and Staats 2021, arXiv 2112.05682), and the casts of CUDA's autocast.
"""

import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.functional import conv2d, group_norm, layer_norm, linear, mse_loss, scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safepatch.diffusion import (
    UNET,
    Components,
    Conditioning,
    FluxHost,
    Host,
    SD3Host,
    UNetHost,
    empty_unet,
    family,
    host_kind,
    open_host,
    states_width,
)
from safepatch.patch import Patch
from safepatch.patch.host import patched_prediction

META = torch.device("meta")
TOKENS = 77  # of a prompt that CLIP reads
LOWERED = {linear, conv2d, torch.matmul, torch.bmm, torch.einsum, scaled_dot_product_attention}  # by CUDA's autocast
RAISED = {group_norm, layer_norm, softmax, mse_loss}  # to float32


class Held(NamedTuple):
    """Bytes beside the weights.

    Attributes:
        saved: after the forward pass, for the backward pass.
        peak: at most, in both, the patch's gradients among them.
    """

    saved: int
    peak: int


def meta_host(config: Mapping[str, Any], size: int, dtype: torch.dtype, scale: int = 1) -> Host:
    """A host of this configuration without weights, for pictures of `size` x `size` pixels, `scale` to a latent.

    Raises:
        ConfigError: for a size that it cannot draw.
    """
    unet = empty_unet(config, dtype)
    vae, second = _Stub(block_out_channels=(0,) * scale.bit_length()), None
    if host_kind(unet) is not UNET:
        return open_host(Components(unet, vae, None, None, _Stub(num_train_timesteps=1000)), size)  # type: ignore[arg-type]
    if width := pooled_width(config):
        second = _Stub(projection_dim=width)
    return _MetaHost(Components(unet, vae, None, None, None, text_encoder_2=second), size)  # type: ignore[arg-type]


def told(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many text states a host of this configuration is given of a prompt by default, and how wide they are."""
    if "cross_attention_dim" in config:
        return TOKENS, states_width(config)
    flow = FluxHost.tokens if family(config) == "flux" else TOKENS + SD3Host.tokens
    return flow, config["joint_attention_dim"]


def pooled_width(config: Mapping[str, Any]) -> int:
    """Of the pooled text states that SDXL, SD3 and Flux are told; 0 for a UNet that is told none."""
    if "cross_attention_dim" not in config:
        return config["pooled_projection_dim"]
    total = config.get("projection_class_embeddings_input_dim")
    numbers = 5 if family(config) == "sdxl-refiner" else 6
    return total - numbers * config["addition_time_embed_dim"] if total else 0


def step_bytes(host: Host, patch: Patch, rows: int, tokens: int, autocast: torch.dtype | None) -> Held:
    """What a forward and a backward pass on `rows` rows hold, by `patched_prediction` on a `meta_host`."""
    given = inputs(host, rows, tokens)
    with AsOnGpu(autocast), Tally([*host.unet.parameters(), *patch.parameters()]) as tally:
        predicted = patched_prediction(host, patch, *given, given[2].states[:1])
        saved, loss = tally.now, predicted.sum()
        # `backward` would put the first of the two modes aside, which blocks that are recomputed need.
        Variable._execution_engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
    patch.zero_grad(set_to_none=True)
    return Held(saved, tally.peak)


@torch.no_grad()
def drawing_bytes(host: Host, rows: int, tokens: int) -> int:
    """What a call of the host alone on `rows` rows holds at most."""
    with AsOnGpu(None), Tally(list(host.unet.parameters())) as tally:
        host.predict(*inputs(host, rows, tokens))
    return tally.peak


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and still alive.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: list[Any]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._alive: dict[int, Any] = {id(storage): None for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it makes; views share what is counted already."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            self.now -= size
            self._alive.pop(key)

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class AsOnGpu(TorchFunctionMode):
    """Makes meta tensors do what a GPU's would.

    Args:
        autocast: what products are computed in under autocast; None for no autocast.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._autocast = autocast
        self._weights: dict[int, Tensor] = {}  # cast once, as autocast does with what is trained

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on what autocast would give it."""
        kwargs, dtype = kwargs or {}, None
        if self._autocast:
            dtype = self._autocast if func in LOWERED else torch.float32 if func in RAISED else None
        if dtype:
            args = [self._cast(value, dtype) for value in args]
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not isinstance(value, nn.Parameter) or not value.requires_grad:
            return value.to(dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(dtype)
        return self._weights[id(value)]


class _Attention(torch.autograd.Function):
    """What memory-efficient attention keeps, without attending."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        made = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, made)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _MetaHost(UNetHost):
    """A host that has no autoencoder to look with at what an inpainting UNet finds around its mask."""

    @property
    def _surroundings(self) -> Tensor:  # type: ignore[override]
        return torch.zeros(1, *self.latent_shape, device=META)


class _Stub(nn.Module):
    """As much of a part as a host looks at when it does not run it."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)


def inputs(host: Host, rows: int, tokens: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Noisy latents, timesteps and conditioning of `rows` rows."""
    config = host.unet.config
    with META:
        pooled = torch.zeros(rows, width) if (width := pooled_width(config)) else None
        states = torch.zeros(rows, tokens, told(config)[1])
        return torch.zeros(rows, *host.latent_shape), torch.zeros(rows).long(), Conditioning(states, pooled)
