"""Put an adapter that was trained across a cut back on the base that it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from torch import nn

from .peft_adapters import changes_the_base
from .provenance import PLAN_FILE, load_plans, recall, recall_from, record_of
from .surgery import compress_

if TYPE_CHECKING:
    from peft import PeftModel


def load_compressed_peft(base: nn.Module, directory: str | Path, **kwargs: Any) -> PeftModel:
    """Cut a base model as it was cut while an adapter was trained on it, and put the adapter on it.

    The adapter's directory holds the plans of all cuts: a `PeftModel` that was cut saves them with its adapters, in
    every checkpoint of the Trainer and in `save_pretrained`. To resume a training from a checkpoint that lies behind a
    cut, build the model with this and `is_trainable=True`, then call `trainer.train(resume_from_checkpoint=...)`.

    Args:
        base: the model that the adapter was made for, with all its states; it is cut in place.
        directory: what the adapter was saved in, or the name of a repository on the Hub.
        kwargs: for `PeftModel.from_pretrained`: `is_trainable`, `adapter_name`, ...

    Raises:
        FileNotFoundError: there is no plan.
        ValueError: the plan does not fit the base (it may be cut already), or the adapter does not belong to the
            original base.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> from hf_compressm import CompreSSMConfig, compress
        >>> _ = torch.manual_seed(0)
        >>> base = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=8, num_hidden_layers=1))
        >>> weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        >>> model = get_peft_model(base, LoraConfig(target_modules=["in_proj", "x_proj"]))
        >>> report = compress(model, [torch.arange(8).repeat(4, 1)], CompreSSMConfig(state_size=2))
        >>> original = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, state_size=8, num_hidden_layers=1))
        >>> _ = original.load_state_dict(weights)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     model.save_pretrained(directory)
        ...     again = load_compressed_peft(original, directory)
        >>> torch.equal(again.eval()(torch.arange(8)[None]).logits, model.eval()(torch.arange(8)[None]).logits)
        True
    """
    # An optional dependency.
    from peft import PeftConfig, PeftModel

    directory = Path(directory) if Path(directory).is_dir() else Path(snapshot_download(str(directory)))
    # Of several adapters, those with names of their own lie in folders, and the plans beside these.
    plans = load_plans(directory) or load_plans(directory.parent)
    if not plans:
        raise FileNotFoundError(
            f"{directory} has no {PLAN_FILE.format(number=1)}: the adapter there was not trained across a cut, or not "
            "saved by PeftModel.save_pretrained; without a plan, use PeftModel.from_pretrained"
        )
    config = PeftConfig.from_pretrained(directory)
    if changes_the_base(config):
        raise ValueError(
            f"{directory}: the adapter was made by init_lora_weights={config.init_lora_weights!r}, which changed the "
            "base's weights before the cut; only the merged model can be saved and loaded"
        )
    for plan in plans:
        compress_(base, plan)
    model = PeftModel.from_pretrained(base, directory, **kwargs)
    recall(model, record_of(base), vars(base)["compressm_plans"])
    # It knows more of the cuts than their plans do: steps, losses, seconds.
    recall_from(model, directory)
    return model
