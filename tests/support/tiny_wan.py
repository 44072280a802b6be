"""A WanPipeline folder as small as can be, random weights and tokenizer included, and LoRAs for it."""

from __future__ import annotations

from pathlib import Path

import torch


def save_pipeline(folder: Path) -> Path:
    """One layer of 2 heads, a VAE without residual blocks, a text encoder of one layer; returns the folder."""
    import diffusers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "surfs"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = UMT5Config(vocab_size=len(words), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, ffn_dim=64, text_dim=32, freq_dim=32, num_layers=1
    )
    diffusers.WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
        text_encoder=UMT5EncoderModel(text),
        vae=diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def save_lora(pipeline: Path, file: Path, rank: int, seed: int) -> Path:
    """A LoRA with random weights on the attention's projections; returns the file."""
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    transformer = diffusers.WanTransformer3DModel.from_pretrained(pipeline / "transformer")
    torch.manual_seed(seed)
    transformer.add_adapter(
        LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    diffusers.WanPipeline.save_lora_weights(file.parent, get_peft_model_state_dict(transformer), weight_name=file.name)
    return file
