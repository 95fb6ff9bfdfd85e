"""Select and wrap the weights that Stage 1 trains.

All of nano is trained. In an official graph SAM 2.1's image encoder and memory, DINOv2 and Qwen3-VL stay
as published. Stage 1 trains LoRA on the language model's linears (Sa2VA's recipe), the row of <SEG> in
its vocabulary, the projector and SAM's mask decoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from vessa_server.model.language.vlm import LanguageModel
from vessa_server.model.vessa import Vessa

_LINEARS = r"model\.language_model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Lora:
    """LoRA of an official language model; nano has none. alpha is twice the rank, as in LISA and Sa2VA."""

    rank: int = 128
    dropout: float = 0.05


class SpareRow(nn.Module):
    """A frozen vocabulary table (embedding or output head) with one trained row."""

    def __init__(self, table: nn.Module, index: int, row: nn.Parameter) -> None:
        super().__init__()
        self.table, self.index, self.row = table, index, row

    def forward(self, x: Tensor) -> Tensor:
        """Apply the table with the trained row in place of its own row."""
        out: Tensor = self.table(x)
        if isinstance(self.table, nn.Embedding):
            return torch.where((x == self.index)[..., None], self.row.to(out.dtype), out)
        place = torch.tensor([self.index], device=out.device)
        return out.index_copy(-1, place, F.linear(x, self.row[None].to(x.dtype)).to(out.dtype))

    def fold(self) -> nn.Module:
        """Return the table with the trained row in it."""
        with torch.no_grad():
            weight = self.table.get_parameter("weight")
            weight[self.index] = self.row.to(weight.dtype)
        return self.table


class Adapter:
    """LoRA and the row of <SEG> on a frozen language model, which is changed in place until `fold`."""

    def __init__(self, language: LanguageModel, lora: Lora) -> None:
        self.language = language
        model = language.model
        config = LoraConfig(
            r=lora.rank, lora_alpha=2 * lora.rank, lora_dropout=lora.dropout, target_modules=_LINEARS
        )
        model.requires_grad_(False)
        self._tuner = LoraModel(model, config, "default")
        inputs: Any = model.get_input_embeddings()
        outputs: Any = model.get_output_embeddings()
        row = nn.Parameter(inputs.weight[language.seg_id].detach().float().clone())
        head_row = row  # tied tables are one
        if outputs.weight is not inputs.weight:
            head_row = nn.Parameter(outputs.weight[language.seg_id].detach().float().clone())
        model.set_input_embeddings(SpareRow(inputs, language.seg_id, row))
        model.set_output_embeddings(SpareRow(outputs, language.seg_id, head_row))

    def fold(self) -> None:
        """Merge LoRA and the row into the weights, which makes the language model an ordinary one again."""
        model: Any = self.language.model
        model.set_input_embeddings(model.get_input_embeddings().fold())
        model.set_output_embeddings(model.get_output_embeddings().fold())
        merged: Any = self._tuner.merge_and_unload()
        self.language.model = merged


def choose(model: Vessa, lora: Lora) -> Adapter | None:
    """Freeze the weights that Stage 1 does not train; trained ones become float32. Nano has no adapter."""
    if is_nano(model):
        return None
    model.requires_grad_(False)
    model.segmenter.sam.sam_mask_decoder.requires_grad_(True)
    adapter = None
    if model.language is not None and model.projector is not None:
        adapter = Adapter(model.language, lora)
        model.projector.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapter


def is_nano(model: Vessa) -> bool:
    """Whether the graph is nano's, all of which is trained, its retriever included."""
    return model.preset.segmenter.config is None


def training_mode(model: Vessa) -> None:
    """Put trained modules into training mode and frozen ones into eval mode, as they are served."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def changing(model: Vessa) -> dict[str, Tensor]:
    """Return the tensors that training changes, by state name: all except frozen parameters."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {k: v for k, v in model.state_dict().items() if k not in frozen}
