"""Prepares a transformers model for training: expert-parallel experts, LoRA weights (A and B), and the loss in place
of lm_head.

Shapes: T tokens of a micro-batch, N predicted tokens, H hidden size.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config

from train.checkpoints.adapter_files import load_adapter
from train.checkpoints.layout import has_own_head, plan_load
from train.checkpoints.reader import Checkpoint
from train.checkpoints.streaming import Loaded, load
from train.data.batches import Batch
from train.data.row import Row
from train.experts.dispatch import ExpertGroup
from train.experts.module import ExpertParallelExperts
from train.experts.recompute import fix_choices, same_routing
from train.layers import norms
from train.layers.lora import LoRALinear, LoRASettings, lora_linears
from train.layers.mixing import install, states_of_row
from train.masking.loss import LossHead, Terms
from train.runtime.distributed import failing_together
from train.runtime.errors import UserError

AFTER_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier", "output_multiplier")
"""Settings of transformers' models that change the logits after lm_head. They would be ignored, since the loss replaces
lm_head."""


ENDED_BY_EXPERTS = ("Qwen3_5MoeDecoderLayer", "Qwen3MoeDecoderLayer", "DeepseekV3DecoderLayer")
"""transformers' layers that only add the output of their experts to the residual stream. No gradient needs that output,
so a recomputation skips it. In a layer that did need it, it would be NaN, and so would the gradients."""


LENS_LAYERS = 16  # whose states are normed and read at once; all at once would double what a deep model keeps of them
MOST_LAYERS = 10_000  # far beyond any model


def text_config(checkpoint: Checkpoint) -> Any:
    """Returns the configuration of the checkpoint's text model, without dropout, caches and router loss.

    lm_head is tied to the embedding if transformers' class of the checkpoint's architecture ties it and the checkpoint
    has no separate weight for it: transformers does not tie a separate weight either, if it differs. Raises UserError
    for a config.json that transformers rejects, and for settings that change the logits after lm_head.
    """
    try:
        if checkpoint.config.get("model_type") == "kimi_k2":  # DeepSeek-V3 under a name that transformers does not know
            own = {"model_type", "auto_map", "architectures", "quantization_config"}
            whole: Any = DeepseekV3Config(**{k: v for k, v in checkpoint.config.items() if k not in own})
        else:
            whole = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
        config = whole.get_text_config()
    except Exception as error:  # transformers raises any kind of exception for an invalid value
        raise UserError(
            f"--model {checkpoint.directory}: transformers {transformers.__version__} rejects its config.json "
            f"(model_type {checkpoint.config.get('model_type')!r}): {error}"
        ) from None
    # A text model's class reads this flag from its own configuration, a multimodal model's from the outer one.
    deciding = config if architecture(checkpoint).endswith("ForCausalLM") else whole
    config.tie_word_embeddings = deciding.tie_word_embeddings and not has_own_head(checkpoint)
    config.use_cache, config.output_router_logits = False, False
    for name, value in config.to_dict().items():
        if re.search("drop|_p$", name) and isinstance(value, float):
            setattr(config, name, 0.0)
    for name in AFTER_HEAD:
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(
                f"--model {checkpoint.directory}: {name} {getattr(config, name)} in config.json changes logits after "
                "lm_head, which is not supported; use a model without it."
            )
    return config


def architecture(checkpoint: Checkpoint) -> str:
    """Returns the model class that config.json names, or "". It may be transformers' own or the model maker's, and
    decides how adapters name modules. Raises UserError if `architectures` is not a list of names."""
    named = checkpoint.config.get("architectures") or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise UserError(f"--model {checkpoint.directory}: architectures in config.json must be a list of names.")
    return named[0]


def skeleton(config: Any, ep: ExpertGroup) -> Any:
    """Returns the model on the meta device, with its `experts` modules replaced by expert-parallel ones that hold no
    weights yet. Raises UserError for a model with parts that this trainer would not train correctly."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:  # transformers would build them one by one, without an end
        raise UserError(f"--model: num_hidden_layers {layers} in config.json: must be at most {MOST_LAYERS}.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises any kind of exception for an invalid value
        raise UserError(f"--model: transformers cannot build a causal LM from config.json: {error!r}") from None
    install(model)
    norms.install(model)
    unknown = _unlike_llama(model) or _blind_to_documents(model)
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            top = getattr(config, "num_experts_per_tok", 1)
            experts = _expert_parallel(name, module, top, ep)
            _replace(model, name, experts)
            fix_choices(model.get_submodule(name.rpartition(".")[0]), experts)
            experts.ends_the_layer = type(model.get_submodule(name.split(".mlp.")[0])).__name__ in ENDED_BY_EXPERTS
        elif module._non_persistent_buffers_set and not _rebuilt(model, name, module, config):
            values = ", ".join(sorted(module._non_persistent_buffers_set))
            unknown.append(f"{name} has values that no checkpoint contains ({values})")
        elif isinstance(module, nn.Dropout) and module.p:
            unknown.append(f"{name} has dropout")
    if unknown:
        raise UserError(
            f"--model: {type(model).__name__} is not supported: {'; '.join(unknown[:3])}. Supported "
            "architectures are those of Qwen3.5-MoE, Qwen3-MoE, DeepSeek-V3, Kimi K2 and Llama."
        )
    return model


def _unlike_llama(model: Any) -> list[str]:
    """Returns how a model deviates from the expected structure: layers in `model`, a head lm_head, and linear layers of
    torch's own class."""
    found = []
    if model.base_model_prefix != "model" or not hasattr(model, "model"):
        found.append(f"its layers are in {model.base_model_prefix!r}, not in 'model'")
    head = getattr(model, "lm_head", None)
    if type(head) is not nn.Linear:
        found.append("it has no lm_head" if head is None else f"lm_head is a {type(head).__name__}, not torch's Linear")
    elif head.bias is not None:
        found.append("lm_head has a bias")
    if not lora_linears(model):
        own = {
            type(m).__name__ for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 2
        }
        others = ", ".join(sorted(own - {"Embedding", "Linear"})) or "none"
        found.append(f"there is no linear layer to put LoRA on: its own are {others}, not torch's Linear")
    return found


def _blind_to_documents(model: Any) -> list[str]:
    """Returns what is wrong with a model whose layers do not get the document boundaries of a packed row.

    Models with experts are not checked here but in their first forward, since experts need values.
    """
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        return []
    row = Row([1, 1])
    with contextlib.suppress(Exception):  # a class that does not take the row may raise any kind
        states_of_row(model, torch.zeros(2, dtype=torch.int64, device="meta"), row)
    heard = row.mixed == len(getattr(model.model, "layers", ()))
    return [] if heard else ["its attention is not transformers' common one, and is not given the document boundaries"]


def _rebuilt(model: nn.Module, name: str, module: Any, config: Any) -> bool:
    """Replaces a module that holds only tables, such as rotary frequencies, by one with values, since no checkpoint has
    them. Returns False if it is not such a module."""
    if list(module.parameters()) or list(module.children()) or {*module._buffers} != module._non_persistent_buffers_set:
        return False
    try:
        _replace(model, name, type(module)(config))
    except Exception:  # its constructor takes something other than the configuration
        return False
    return True


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _expert_parallel(name: str, module: Any, top: int | None, ep: ExpertGroup) -> ExpertParallelExperts:
    """Returns the module that replaces transformers' experts, which sends each token to `top` of them. Raises UserError
    for experts of another form or number than this trainer supports."""
    weights = dict(module.named_parameters())
    if (
        set(weights) != {"gate_up_proj", "down_proj"}
        or weights["gate_up_proj"].shape[1] != 2 * weights["down_proj"].shape[2]
    ):
        raise UserError(
            f"--model: experts of {name} ({type(module).__name__}) are not gated MLPs with gate_up_proj [experts, 2 x "
            "width, hidden] and down_proj [experts, hidden, width]; this model family is not supported."
        )
    experts, hidden, width = weights["down_proj"].shape
    if hidden % 8 or width % 8:
        raise UserError(
            f"--model: experts of {name} are {hidden} wide outside and {width} inside; both must be multiples of 8, "
            "as grouped products require."
        )
    if top is None or not 0 < top <= experts:
        raise UserError(
            f"--model: num_experts_per_tok is {top} in config.json; must be from 1 to the {experts} experts of {name}. "
            "Is config.json this checkpoint's own?"
        )
    if experts % ep.size:
        raise UserError(f"--expert-parallel {ep.size}: must divide the model's {experts} experts per layer.")
    return ExpertParallelExperts(name, experts, hidden, width, module.act_fn, ep)


def create_expert_group(size: int) -> ExpertGroup:
    """Divides the ranks into expert-parallel groups of `size` consecutive ranks and returns this rank's group. Also
    creates the expert-data-parallel groups.

    All ranks must call it. Raises UserError on all ranks if their sizes differ, as they do by default on nodes with
    different GPUs.
    """
    sizes = [size] * dist.get_world_size()
    dist.all_gather_object(sizes, size)
    if len(others := sorted({*sizes})) > 1:
        raise UserError(
            f"--expert-parallel: not given, and the nodes would divide the experts by {' and '.join(map(str, others))} "
            "ranks, since their GPUs differ; must be the same on all nodes. Give it."
        )
    groups._create_expert_and_data_parallel(size)
    replicas = groups._get_expert_data_parallel_group(f"ep_size_{size}")
    if size == 1:
        return ExpertGroup(replicas=replicas)
    group = groups._get_expert_parallel_group(f"ep_size_{size}")
    return ExpertGroup(size, dist.get_rank(group), group, replicas)


def add_lora(model: Any, settings: LoRASettings, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Adds LoRA weights to every linear layer and every expert, and tags those of the experts for ZeRO-3."""
    for name, linear in lora_linears(model).items():
        _replace(model, name, LoRALinear(name, linear, settings, device))
    for module in model.modules():
        if isinstance(module, ExpertParallelExperts):
            module.add_lora(settings, compute_dtype, device)
            for parameter in module.parameters():
                for tag, value in module.ep.zero3_tags().items():
                    setattr(parameter, tag, value)


class LanguageModel(nn.Module):
    """transformers' model with the loss in place of lm_head. Forward: Batch -> Terms of its N predicted tokens."""

    def __init__(
        self, model: Any, architecture: str, lora: LoRASettings | None, device: torch.device, compute_dtype: torch.dtype
    ):
        super().__init__()
        self.causal, self.architecture = model, architecture
        model.lm_head = LossHead(model.lm_head)
        self.expert_layers = [m for m in model.modules() if isinstance(m, ExpertParallelExperts)]
        if lora is not None:
            add_lora(model, lora, compute_dtype, device)
            if lora.lm_head:
                model.lm_head.add_lora(lora, device)

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        return len(self.causal.model.layers)

    def enable_gradient_checkpointing(self) -> None:
        """Makes each layer save only its input, and recompute the rest in backward with the first forward's routing."""
        self.causal.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": same_routing})

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside the context, LoRA weights add exactly nothing: the model is its base. They are not changed."""
        scaled: list[Any] = [m for m in self.modules() if isinstance(m, LoRALinear | LossHead | ExpertParallelExperts)]
        scales = [module.scale for module in scaled]
        try:
            for module in scaled:
                module.scale = 0.0
            yield
        finally:
            for module, scale in zip(scaled, scales, strict=True):
                module.scale = scale

    def forward(self, batch: Batch, by_layer_N: Tensor | None = None) -> Terms:
        """Returns the loss terms of the batch: loss (scalar), term [N] and nll [N]. by_layer_N: the targets whose nll
        is also returned after each decoder layer. Raises RuntimeError if a layer does not get the document boundaries.
        """
        of_base = (self._base_states(batch.base.batch), batch.base.known_N) if batch.base else ()
        with self._kept(batch, by_layer_N) as kept:
            hidden_NH = self._states(batch)
        terms = self.causal.lm_head(hidden_NH, batch.target_N, batch.coefficient_N, batch.kind_N, *of_base)
        if by_layer_N is None:
            return terms
        target_M = batch.target_N[by_layer_N]
        return terms._replace(layers_DM=torch.cat([self._lens(kept, target_M), terms.nll_N[None, by_layer_N]]))

    @contextlib.contextmanager
    def _kept(self, batch: Batch, which_N: Tensor | None) -> Iterator[list[Tensor]]:
        """Gives a list that gets the states [M, H] that predict M of the targets, after each layer but the last one;
        without which_N none."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            hidden_1TH = output[0] if isinstance(output, tuple) else output
            kept.append(hidden_1TH[0].index_select(0, position_M))

        if which_N is None:
            yield kept
            return
        position_M = batch.position_N[which_N]
        hooks = [layer.register_forward_hook(keep) for layer in self.causal.model.layers[:-1]]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    def _lens(self, kept: list[Tensor], target_M: Tensor) -> Tensor:
        """Returns the nll [layers, M] of M targets by states [M, H] of each layer, which the model's final norm and
        head read as if that layer were the last one ("logit lens", nostalgebraist 2020). LENS_LAYERS layers go through
        each of the two in one call, on every rank as many."""
        found = [torch.zeros(0, len(target_M), device=target_M.device)]
        for start in range(0, len(kept), LENS_LAYERS):
            some = kept[start : start + LENS_LAYERS]
            hidden_KH = self.causal.model.norm(torch.stack(some)).flatten(0, 1)
            target_K = target_M.repeat(len(some))
            nothing = hidden_KH.new_zeros(len(target_K)), torch.zeros_like(target_K, dtype=torch.int8)
            found.append(self.causal.lm_head(hidden_KH, target_K, *nothing).nll_N.unflatten(0, (len(some), -1)))
        return torch.cat(found)

    def _states(self, batch: Batch) -> Tensor:
        """Returns the hidden states [N, H] that predict the batch's N targets."""
        for layer in self.expert_layers:  # the token of a batch without documents is sent to no expert
            layer.keep_T = None if batch.names else torch.zeros_like(batch.ids_T, dtype=torch.bool)
        mixed = batch.row.mixed
        hidden_TH = states_of_row(self.causal, batch.ids_T, batch.row, batch.position_T)
        if batch.row.mixed - mixed != len(self.causal.model.layers):
            raise RuntimeError(
                f"{type(self.causal).__name__} does not pass the document boundaries to each of its layers."
            )
        return hidden_TH.index_select(0, batch.position_N)  # unlike [], needs no sort for its gradient on a GPU

    @torch.no_grad()
    def _base_states(self, batch: Batch) -> Tensor:
        """Returns the base's hidden states [M, H] that predict the batch's M targets. The load of the experts is that
        of the model alone."""
        loads = [layer.load_E for layer in self.expert_layers]
        with self.without_adapter():
            hidden_MH = self._states(batch)
        for layer, load_E in zip(self.expert_layers, loads, strict=True):
            layer.load_E = load_E
        return hidden_MH


def build(
    checkpoint: Checkpoint,
    method: str,
    lora: LoRASettings | None,
    adapter: str,
    expert_parallel: int,
    ds_config: dict[str, Any],
    device: torch.device,
) -> tuple[LanguageModel, Loaded]:
    """Reads the checkpoint into a ZeRO-3 model, ready for deepspeed.initialize.

    lora: None under --method full. adapter: directory with the initial LoRA weights, or "". All ranks must call it, and
    an error on one rank is raised on all. Raises UserError for a model or checkpoint that is not supported.
    """
    group = create_expert_group(expert_parallel)
    with failing_together():
        model = skeleton(text_config(checkpoint), group)
        plan = plan_load(model, checkpoint)
        wrapped = LanguageModel(model, architecture(checkpoint), lora, device, compute_dtype=plan.dtype)
        if lora and adapter:
            load_adapter(Path(adapter), wrapped, lora)
        # Planned again, for the modules that hold the weights now. Their names are still those of transformers.
        plan = plan_load(model, checkpoint)
        return wrapped, load(plan, checkpoint, method, ds_config, device, show=dist.get_rank() == 0)


def count_trainable(model: Any, lora: LoRASettings | None) -> int:
    """Returns the number of trained parameters of the whole model, with the experts of all ranks and without padding.

    model: a skeleton. lora: None if all parameters are trained.
    """
    experts = [module for module in model.modules() if isinstance(module, ExpertParallelExperts)]
    if lora is None:
        return sum(p.numel() for p in model.parameters()) + sum(
            e * o * i for layer in experts for e, o, i in layer.shapes().values()
        )
    count = sum(lora.rank * (m.in_features + m.out_features) for m in lora_linears(model).values())
    if lora.lm_head:
        count += lora.rank * (model.lm_head.in_features + model.lm_head.out_features)
    for layer in experts:
        count += sum(e * lora.expert_rank * (o + i) for e, o, i in layer.shapes().values())
    return count
