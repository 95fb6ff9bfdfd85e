"""Run Qwen3-VL on template overlay and target; its state at <SEG> locates the structure.

The answer is teacher-forced, so one forward pass gives the state and <SEG> is never missing. Template
and text come first, so that a prefix cache can serve every target of a template.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from vessa.errors import InvalidWeights
from vessa_server.model.geometry import resize
from vessa_server.model.language.instructions import DEFAULT_INSTRUCTION, INSTRUCTIONS, answer, ask
from vessa_server.model.presets import LanguagePreset

SEG = "<SEG>"
_PATCH, _MERGE = 16, 2
_SPECIAL: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
_SPECIAL += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", SEG)
_CHAT = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for c in m.content %}"
    "{%- if c.type == 'image' or 'image' in c or 'image_url' in c %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'text' in c %}{{- c.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
)


def stored_state(module: nn.Module, half: bool) -> dict[str, Tensor]:
    """Return a copy of a module's state on the CPU, floats as float16 when `half`."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    return {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()}


def as_seen(images: Tensor, size: int) -> Tensor:
    """Resize images to the language model's square, uint8 (N, 3, size, size), as they are sent to vLLM.

    images: (N, 3, S, S) float in [0, 1]
    """
    return (resize(images, (size, size)) * 255).round().clamp(0, 255).byte()


class Probe:
    """One fixed conversation. Its state identifies a language model, wherever it runs."""

    CLASS, INSTRUCTION = "left ventricle", DEFAULT_INSTRUCTION

    @staticmethod
    def images() -> tuple[Tensor, Tensor]:
        """Return template and target, (1, 3, 256, 256) float: ramps and rings, the same in every run."""
        ramp = torch.linspace(0, 1, 256)
        down, across = torch.meshgrid(ramp, ramp, indexing="ij")
        rings = 0.5 + 0.5 * torch.cos(40 * torch.hypot(down - 0.4, across - 0.6))
        return torch.stack([down, across, rings])[None], torch.stack([rings, down, 1 - across])[None]

    @classmethod
    @torch.inference_mode()
    def state(cls, language: "LanguageModel") -> list[float]:
        """Return the state of a language model in this process at <SEG>."""
        weights: Any = language.model
        device = next(weights.parameters()).device
        overlays, targets = (images.to(device) for images in cls.images())
        states, _ = language(overlays, targets, [cls.CLASS], [cls.INSTRUCTION])
        return [round(value, 6) for value in states[0].tolist()]


class LanguageModel(nn.Module):
    """A Qwen3-VL with its processor.

    images are float (N, 3, S, S) in [0, 1]; every image becomes the same number of vision tokens.
    """

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, image_size: int
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.image_size = image_size
        self.seg_id = processor.tokenizer.convert_tokens_to_ids(SEG)
        self._encoded: dict[tuple[str, str], tuple[list[int], int]] = {}

    @classmethod
    def nano(cls, preset: LanguagePreset) -> "LanguageModel":
        """Build the small graph with random weights and its own tokenizer."""
        processor = _nano_processor(preset.image_size)
        return cls(_nano_model(preset, processor), processor, preset.image_size)

    @classmethod
    def read(
        cls, folder: Path, image_size: int, dtype: torch.dtype | Literal["auto"] = torch.float32
    ) -> "LanguageModel":
        """Read a Hugging Face directory, without access to a hub.

        dtype: of the weights in memory; "auto" keeps the stored one
        Raises InvalidWeights when a tensor is missing, which transformers would initialize at random.
        """
        loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
        model, found = loaded
        if lost := sorted([*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]):
            raise InvalidWeights(
                f"{folder.name}/ does not fit its config.json: {lost[:5]} ({len(lost)} keys)"
            )
        processor = Qwen3VLProcessor.from_pretrained(folder, local_files_only=True)
        return cls(model, processor, image_size)

    def write(self, folder: Path, *, half: bool) -> None:
        """Write a directory for `read` and vLLM; `half` stores float16."""
        self.model.save_pretrained(folder, state_dict=stored_state(self.model, half))
        self.processor.save_pretrained(folder)

    @property
    def hidden_size(self) -> int:
        """Length of the state at <SEG>."""
        config: Any = self.model.config.text_config
        return int(config.hidden_size)

    def forward(
        self, overlays: Tensor, targets: Tensor, class_names: list[str], instructions: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Read N pairs of template overlay and target.

        overlays, targets: (N, 3, S, S) float in [0, 1]
        Returns the final-layer states at <SEG> (N, hidden) float32 and the mean cross-entropy over
        the answer's tokens (Eq. 2).
        """
        encoded = [self.encode(i, c) for i, c in zip(instructions, class_names, strict=True)]
        length = max(len(ids) for ids, _ in encoded)
        device = overlays.device
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.full((len(encoded), length), pad, dtype=torch.long)
        attention = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, (tokens, answer_length) in enumerate(encoded):  # left padding: <SEG> is always last
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            attention[row, length - len(tokens) :] = 1
            labels[row, length - answer_length :] = ids[row, length - answer_length :]
        pixels, grid = self.pixels(torch.stack([overlays, targets], dim=1).flatten(0, 1))
        image_id = self.model.config.image_token_id
        output = self.model.model(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            pixel_values=pixels,
            image_grid_thw=grid.to(device),
            mm_token_type_ids=(ids == image_id).int().to(device),
            use_cache=False,
        )
        states = output.last_hidden_state
        longest = max(answer_length for _, answer_length in encoded)
        logits = self.model.lm_head(states[:, -longest - 1 : -1])
        answers = labels[:, -longest:].flatten().to(device)
        text_loss = F.cross_entropy(logits.flatten(0, 1).float(), answers)
        return states[:, -1].float(), text_loss

    def answer_tokens(self, class_names: list[str], instructions: list[str]) -> int:
        """Count the answer tokens, over which the text loss of `forward` is a mean."""
        return sum(self.encode(i, c)[1] for i, c in zip(instructions, class_names, strict=True))

    def encode(self, instruction: str, class_name: str) -> tuple[list[int], int]:
        """Return the token ids of one conversation that ends in <SEG>, and the number of answer tokens."""
        key = (instruction, class_name)
        if key not in self._encoded:
            if len(self._encoded) > 4096:
                self._encoded.clear()
            image = {"type": "image"}
            content = [image, {"type": "text", "text": ask(instruction, class_name)}, image]
            messages: Any = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer(class_name)},
            ]
            text = self.processor.apply_chat_template(messages, tokenize=False, continue_final_message=True)
            vision_tokens = (self.image_size // (_PATCH * _MERGE)) ** 2
            text = text.replace("<|image_pad|>", "<|image_pad|>" * vision_tokens)
            tokens = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            prefix = self.processor.tokenizer(answer(class_name), add_special_tokens=False)["input_ids"]
            self._encoded[key] = (tokens, len(prefix))
        return self._encoded[key]

    def pixels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten (N, 3, S, S) images into Qwen's patches, as its image processor does.

        The processor itself works on lists of images and takes longer than the nano model. A test
        compares this method with the processor's output.
        """
        images = (as_seen(images, self.image_size).float() / 255 - 0.5) / 0.5
        count, channels = images.shape[:2]
        side, blocks = self.image_size // _PATCH, self.image_size // (_PATCH * _MERGE)
        patches = images.view(count, channels, blocks, _MERGE, _PATCH, blocks, _MERGE, _PATCH)
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)  # blocks of 2 x 2 patches stay together
        patches = patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # a still image, twice
        grid = torch.tensor([[1, side, side]]).expand(count, -1)
        return patches.reshape(count * side * side, channels * 2 * _PATCH * _PATCH), grid


def _nano_processor(image_size: int) -> Qwen3VLProcessor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [ask(i, "left ventricle") + answer("left ventricle") for i in INSTRUCTIONS] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in _SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=2048,
    )
    size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    sizes: dict[str, Any] = {"patch_size": _PATCH, "temporal_patch_size": 2, "merge_size": _MERGE}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, **sizes),
        tokenizer=fast,
        video_processor=Qwen3VLVideoProcessor(cap_pixels_per_frame=True, **sizes),
        chat_template=_CHAT,
    )


def _nano_model(preset: LanguagePreset, processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    def token(name: str) -> int:
        return processor.tokenizer.convert_tokens_to_ids(name)

    head_dim = preset.hidden // preset.heads
    third = head_dim // 2 // 3
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_interleaved": True,
        "mrope_section": [head_dim // 2 - 2 * third, third, third],
    }
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": preset.hidden,
            "intermediate_size": 3 * preset.hidden,
            "num_hidden_layers": preset.layers,
            "num_attention_heads": preset.heads,
            "num_key_value_heads": preset.heads // 2,
            "head_dim": head_dim,
            "max_position_embeddings": 2048,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": preset.vision_layers,
            "hidden_size": preset.vision_hidden,
            "intermediate_size": 3 * preset.vision_hidden,
            "num_heads": 3,
            "patch_size": _PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": _MERGE,
            "out_hidden_size": preset.hidden,
            "num_position_embeddings": (preset.image_size // _PATCH) ** 2,
            "deepstack_visual_indexes": [0, preset.vision_layers - 2],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Qwen3VLForConditionalGeneration(config)
