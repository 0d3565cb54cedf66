"""ComfyUI for tests: a stub of the few calls that the nodes make of it, or a real one, around one random pipeline.

The stub runs diffusers' own blocks in ComfyUI's order and under ComfyUI's names, so that what a patch makes of it can
be compared bit by bit; the real one is a checkout of ComfyUI (https://github.com/comfyanonymous/ComfyUI) that the
environment variable SAFEPATCH_COMFYUI names, loaded from the same weights as a single file.
"""

import copy
import importlib.util
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from safepatch.diffusion import encode_prompts
from safepatch.diffusion.components import Components
from tests.families import RESNET, small_family_pipe, unet_name, write_original

NODES = Path(__file__).parents[1] / "integrations" / "comfyui"
WRAPPERS = {"OUTER_SAMPLE": "outer_sample", "PREDICT_NOISE": "predict_noise", "DIFFUSION_MODEL": "diffusion_model"}


class Executor:
    """Calls a function through wrappers, the first of them outermost."""

    def __init__(self, function: Callable, class_obj: Any, wrappers: Sequence[Callable]) -> None:
        self._function, self.class_obj, self._wrappers = function, class_obj, list(wrappers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wrappers:
            return self._function(*args, **kwargs)
        return self._wrappers[0](Executor(self._function, self.class_obj, self._wrappers[1:]), *args, **kwargs)


class StubUNet(nn.Module):
    """A diffusers UNet in ComfyUI's order: numbered blocks, residuals and patches where ComfyUI has them."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = [unet]  # not a submodule: its blocks are, under ComfyUI's names
        first, last = [[unet.conv_in]], []
        for block in unet.down_blocks:
            first += _pairs(block) + [[down] for down in block.downsamplers or ()]
        for block in unet.up_blocks:
            last += _pairs(block)
            last[-1] += list(block.upsamplers or ())
        mid = unet.mid_block
        self.input_blocks, self.output_blocks = (nn.ModuleList(map(nn.ModuleList, part)) for part in (first, last))
        self.middle_block = nn.ModuleList([mid.resnets[0], *mid.attentions, mid.resnets[1]])

    def get_submodule(self, target: str) -> nn.Module:
        """A layer by ComfyUI's name for it."""
        for ours, original in (*RESNET.items(), ("conv", "op")):
            target = re.sub(rf"\.{re.escape(original)}$", f".{ours}", target)
        return super().get_submodule(target)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Any = None, y: Any = None, control: Any = None,
        transformer_options: Any = None,
    ) -> Tensor:  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        wrappers = options.get("wrappers", {}).get(WRAPPERS["DIFFUSION_MODEL"], {}).values()
        through = [wrapper for some in wrappers for wrapper in some]
        return Executor(self._forward, self, through)(x, timesteps, context, y, control, options)

    def _forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None, control: Any, options: dict[str, Any]
    ) -> Tensor:
        unet, patches = self.unet[0], options.get("patches", {})
        emb = unet.time_embedding(unet.time_proj(timesteps))
        emb = emb if y is None else emb + unet.add_embedding(y)
        skips, h = [], x
        for block in self.input_blocks:
            h = _run(block, h, emb, context)
            for patch in patches.get("input_block_patch", ()):
                h = patch(h, options)
            skips.append(h)
        h = _run(self.middle_block, h, emb, context)
        if control:
            h += control["middle"].pop()
        for block in self.output_blocks:
            skip = skips.pop()
            for patch in patches.get("output_block_patch", ()):
                h, skip = patch(h, skip, options)
            h = _run(block, torch.cat((h, skip), dim=1), emb, context)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def _pairs(block: Any) -> list[list[nn.Module]]:
    attentions = getattr(block, "attentions", None)
    return [[resnet, *([attentions[i]] if attentions else [])] for i, resnet in enumerate(block.resnets)]


def _run(block: Any, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    for layer in block:
        if "Transformer" in type(layer).__name__:
            h = layer(h, encoder_hidden_states=context, return_dict=False)[0]
        else:
            h = layer(h, emb) if "Resnet" in type(layer).__name__ else layer(h)
    return h


class StubSampling:
    """Timesteps of a discrete schedule."""

    sigma_max = torch.tensor(14.6)

    def timestep(self, sigma: Tensor) -> Tensor:
        return torch.tensor(999.0) * sigma / self.sigma_max


class StubModel:
    """ComfyUI's MODEL: a view on a model that clones share, with options and wrappers of its own."""

    def __init__(self, unet: Any) -> None:
        self.model = SimpleNamespace(
            diffusion_model=StubUNet(unet), manual_cast_dtype=None, get_dtype=lambda: torch.float32
        )
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable]]] = {}
        self.sampling = StubSampling()

    def clone(self) -> "StubModel":
        made = copy.copy(self)
        made.model_options = copy.deepcopy(self.model_options)
        made.wrappers = {kind: {key: list(some) for key, some in of.items()} for kind, of in self.wrappers.items()}
        return made

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_model_object(self, name: str) -> Any:
        return {"model_sampling": self.sampling}[name]

    def get_key_patches(self, prefix: str) -> dict[str, list[tuple[Tensor, Callable]]]:
        unet = self.model.diffusion_model.unet[0]
        state = {f"{prefix}{unet_name(name, unet)}": tensor for name, tensor in unet.state_dict().items()}
        return {name: [(tensor, lambda weight, **_: weight)] for name, tensor in state.items()}


class StubEncoder(nn.Module):
    """ComfyUI's model of one of CLIP's encoders: takes lists of tokens, tells states of a layer and pooled ones."""

    def __init__(self, encoder: Any, tokenizer: Any, layer: str, layer_idx: int | None) -> None:
        super().__init__()
        self.transformer, self.max_length = encoder, tokenizer.model_max_length
        self.special_tokens = {"end": tokenizer.eos_token_id}
        self.options_default = (layer, layer_idx, False)
        self.reset()

    def reset(self) -> None:
        self.layer, self.layer_idx, self.return_projected_pooled = self.options_default

    def forward(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        made = self.transformer(torch.tensor([list(row) for row in tokens]), output_hidden_states=True)
        states = made.last_hidden_state if self.layer == "last" else made.hidden_states[self.layer_idx]
        return states.float(), states[:, -1].float()


class StubCLIP:
    """ComfyUI's CLIP, of one or two encoders."""

    def __init__(self, pipe: Any) -> None:
        is_xl = getattr(pipe, "text_encoder_2", None) is not None
        parts = {"l": (pipe.text_encoder, pipe.tokenizer)}
        if is_xl:
            parts["g"] = (pipe.text_encoder_2, pipe.tokenizer_2)
        layer = ("hidden", -2) if is_xl else ("last", None)
        self.cond_stage_model: Any = nn.Module()
        self.tokenizer = SimpleNamespace()
        for name, (encoder, tokenizer) in parts.items():
            setattr(self.cond_stage_model, f"clip_{name}", StubEncoder(encoder, tokenizer, *layer))
            wrapper = SimpleNamespace(
                tokenizer=tokenizer, pad_token=tokenizer.pad_token_id, max_length=tokenizer.model_max_length
            )
            setattr(self.tokenizer, f"clip_{name}", wrapper)
        self.patcher = SimpleNamespace(load_device=torch.device("cpu"))
        self.layer_idx: int | None = None
        self.cond_stage_model.reset_clip_options = self._reset
        self.cond_stage_model.set_clip_options = lambda options: None

    def _reset(self) -> None:
        for encoder in self.cond_stage_model.children():
            encoder.reset()

    def load_model(self) -> None:
        pass

    def clip_layer(self, index: int | None) -> None:
        self.layer_idx = index

    def encode_from_tokens(self, pairs: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Tensor:
        """States of sections, each word at its weight: its way from what an empty prompt makes there."""
        self._reset()
        made = []
        for name, sections in pairs.items():
            encoder = getattr(self.cond_stage_model, f"clip_{name}")
            if self.layer_idx is not None:
                encoder.layer, encoder.layer_idx = "hidden", self.layer_idx
            wrapper = getattr(self.tokenizer, f"clip_{name}")
            empty = wrapper.tokenizer("", padding="max_length").input_ids
            states, _ = encoder([*([token for token, _ in row] for row in sections), empty])
            weights = torch.tensor([[weight for _, weight in row] for row in sections])[..., None]
            made.append((states[-1] + weights * (states[:-1] - states[-1])).flatten(0, 1)[None])
        return torch.cat(made, dim=-1)


class World:
    """What a test needs of ComfyUI.

    Attributes:
        pipe: the same weights in diffusers.
        nodes: the module of the nodes, loaded as ComfyUI loads it.
        model, clip: ComfyUI's, of the same weights.
    """

    def __init__(self, pipe: Any, nodes: Any, model: Any, clip: Any) -> None:
        self.pipe, self.nodes, self.model, self.clip = pipe, nodes, model, clip

    def apply(self, patch: Any, gate: str = "hard", clip: bool = True, model: Any = None, **options: Any) -> Any:
        """The model with a patch."""
        settings = {"strength": 1.0, "start": 0.0, "end": 1.0, **options}
        node = self.nodes.SafepatchApply()
        return node.apply(model or self.model, patch, gate, clip=self.clip if clip else None, **settings)[0]

    def tokens(self, *texts: str, weight: float = 1.0, word: str = "") -> dict[str, Any]:
        """What ComfyUI makes of texts, each a chunk of its own; `word` at a weight."""
        made = {}
        for name in ("l", "h", "g"):
            wrapper = getattr(self.clip.tokenizer, f"clip_{name}", None)
            if wrapper is None:
                continue
            length, end = wrapper.max_length, wrapper.tokenizer.eos_token_id
            heavy = set(wrapper.tokenizer(word).input_ids[1:-1]) if word else set()
            rows = [wrapper.tokenizer(text).input_ids for text in texts]
            assert all(row[-1] == end for row in rows)
            rows = [row + [wrapper.pad_token] * (length - len(row)) for row in rows]
            made[name] = [[(token, weight if token in heavy else 1.0) for token in row] for row in rows]
        return made

    def said(self, *texts: str, **weights: Any) -> Tensor:
        """ComfyUI's text states of that, (1, tokens, width)."""
        return self.clip.encode_from_tokens(self.tokens(*texts, **weights))

    def states(self, *texts: str) -> Tensor:
        """Diffusers' text states, (B, tokens, width)."""
        return encode_prompts(Components.of(self.pipe), texts)

    def predict(self, model: Any, x: Tensor, t: Tensor, states: Tensor, y: Tensor | None = None, **options: Any) -> Any:
        """One call of ComfyUI's UNet with what hangs on the model."""
        options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, **options}
        more = {} if y is None else {"y": y}
        return model.model.diffusion_model(x, t, context=states, transformer_options=options, **more)

    def sample(self, model: Any, positive: Tensor, negative: Tensor, steps: int = 2, cfg: float = 3.0) -> Tensor:
        """Latents (1, 4, 8, 8) by Euler steps under guidance."""
        raise NotImplementedError


class StubWorld(World):
    """The stub's sampler calls the UNet once a step, the negative prompt's row in front."""

    def sample(self, model: Any, positive: Tensor, negative: Tensor, steps: int = 2, cfg: float = 3.0) -> Tensor:
        guider = SimpleNamespace(conds={"positive": [{"uuid": uuid.uuid4()}], "negative": [{"uuid": uuid.uuid4()}]})

        def predict(x: Tensor, timestep: Tensor, model_options: Any, seed: int | None) -> Tensor:
            ids = [guider.conds[side][0]["uuid"] for side in ("negative", "positive")]
            options = {**model_options["transformer_options"], "uuids": ids}
            net = model.model.diffusion_model
            both = torch.cat((negative, positive))
            away, made = net(x.expand(2, -1, -1, -1), timestep.expand(2), both, transformer_options=options).chunk(2)
            return away + cfg * (made - away)

        def outer(noise: Tensor, latent: Any, sampler: Any, sigmas: Tensor, *_: Any) -> Tensor:
            x, options = noise, {"transformer_options": {"wrappers": model.wrappers}}
            for step in range(len(sigmas) - 1):
                timestep = torch.tensor([999.0 * (1 - step / steps)])
                x = x - 0.1 * through("PREDICT_NOISE", predict)(x, timestep, options, None)
            return x

        def through(kind: str, function: Callable) -> Executor:
            some = model.wrappers.get(WRAPPERS[kind], {}).values()
            return Executor(function, guider, [wrapper for each in some for wrapper in each])

        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return through("OUTER_SAMPLE", outer)(noise, None, None, torch.linspace(1, 0, steps + 1))


class RealWorld(World):
    """ComfyUI's own sampler."""

    def sample(self, model: Any, positive: Tensor, negative: Tensor, steps: int = 2, cfg: float = 3.0) -> Tensor:
        import nodes  # type: ignore[import-not-found]

        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        conds = ([[states, {}]] for states in (positive, negative))
        return nodes.common_ksampler(model, 0, steps, cfg, "euler", "normal", *conds, latent)[0]["samples"]

    def controlnet(self, path: Path) -> Any:
        """A ControlNet as ComfyUI's own loader reads it."""
        import comfy.controlnet  # type: ignore[import-not-found]

        return comfy.controlnet.load_controlnet(str(path))

    def sample_told(self, net: Any, positive: Tensor, negative: Tensor, both: bool = False) -> Tensor:
        """`sample`, with a ControlNet on the positive prompt, or on both, and a random hint."""
        import nodes  # type: ignore[import-not-found]

        conds = [[[states, {}]] for states in (positive, negative)]
        told = nodes.ControlNetApplyAdvanced().apply_controlnet(*conds, net, torch.rand(1, 64, 64, 3), 1.0, 0.0, 1.0)
        conds = [told[0], told[1] if both else conds[1]]
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        return nodes.common_ksampler(self.model, 0, 2, 3.0, "euler", "normal", *conds, latent)[0]["samples"]

    @contextmanager
    def lora(self, path: Path) -> Iterator[Any]:
        """The model with a LoRA as ComfyUI's own loader puts it on; within the block, in the weights too."""
        import comfy.model_management  # type: ignore[import-not-found]
        import comfy.sd  # type: ignore[import-not-found]
        import comfy.utils  # type: ignore[import-not-found]

        content = comfy.utils.load_torch_file(str(path), safe_load=True)
        model, _ = comfy.sd.load_lora_for_models(self.model, self.clip, content, 1.0, 0.0)
        comfy.model_management.load_models_gpu([model])
        try:
            yield model
        finally:
            comfy.model_management.load_models_gpu([self.model])


@cache
def _stub_parts(family: str) -> tuple[Any, ModuleType]:
    pipe = small_family_pipe(family)
    pipe.unet.requires_grad_(False)
    with stubbed():
        return pipe, load_nodes("safepatch_nodes_stub")


def stub_world(family: str = "sd1") -> StubWorld:
    """The stub, of which all but the pipeline is new."""
    pipe, nodes = _stub_parts(family)
    return StubWorld(pipe, nodes, StubModel(pipe.unet), StubCLIP(pipe))


def load_nodes(name: str) -> ModuleType:
    """The folder of the nodes as a package of that name, as ComfyUI loads it."""
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES: dict[str, Path] = {}  # what the stub's models/safepatch holds


@contextmanager
def stubbed() -> Iterator[None]:
    """Within the block, what the nodes import of ComfyUI is the stub."""
    paths: Any = ModuleType("folder_paths")
    paths.models_dir = "models"
    paths.add_model_folder_path = lambda name, path: None
    paths.get_filename_list = lambda name: sorted(FILES)
    paths.get_full_path_or_raise = lambda folder, name: str(FILES[name])
    comfy, extension = ModuleType("comfy"), ModuleType("comfy.patcher_extension")
    extension.WrappersMP = type("WrappersMP", (), WRAPPERS)  # type: ignore[attr-defined]
    stubs = {"folder_paths": paths, "comfy": comfy, "comfy.patcher_extension": extension}
    kept = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def real_world(checkout: Path, folder: Path) -> RealWorld:
    """ComfyUI itself, on the CPU, around a small checkpoint of SD 1's structure with ComfyUI's own tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    given, sys.argv = sys.argv, ["main.py", "--cpu"]
    sys.path.append(str(checkout))
    try:
        import comfy.options  # type: ignore[import-not-found]

        comfy.options.enable_args_parsing()
        import comfy.model_management  # type: ignore[import-not-found]
        import comfy.sd  # type: ignore[import-not-found]
        import comfy.supported_models  # type: ignore[import-not-found]
    finally:
        sys.argv = given
    pipe = small_family_pipe("sd1")
    pipe.unet.requires_grad_(False)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 128}
    pipe.tokenizer = CLIPTokenizer.from_pretrained(checkout / "comfy" / "sd1_tokenizer", model_max_length=77)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = {"vocab_size": 49408, "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 77}
        ends = {"bos_token_id": 49406, "eos_token_id": 49407}
        pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**clip, **sizes, **ends)).eval().requires_grad_(False)
    comfy.supported_models.SD15.unet_config["model_channels"] = 32  # by which ComfyUI tells the family
    options = {"clip_l_model_config": sizes, "dtype": torch.float32}
    path = str(write_original(pipe, "sd1", folder / "model.safetensors"))
    model, encoders = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, te_model_options=options)[:2]
    comfy.model_management.load_models_gpu([model])
    return RealWorld(pipe, load_nodes("safepatch_nodes_real"), model, encoders)
