"""ImageReward-v1.0 (Xu et al. 2304.05977): its checkpoint in transformers' BLIP classes, or its own package.

Silent traps, each with a test: BLIP's defaults for text heads (8) and vision eps (1e-5), is_decoder in the
call, no attention mask, dropout: all load strictly, and give another score.
"""

from torch import nn

from judges.clip import build, clip_input
from rewards import read_checkpoint, wide

BLIP_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
               "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}  # fmt: skip
BLIP_TEXT = {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
             "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
             "layer_norm_eps": 1e-12, "is_decoder": True}  # is_decoder: builds the cross-attention  # fmt: skip
BLIP_NAMES = {  # replaced in this order: the last norm, then those of the blocks
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.visual_encoder.": "vision.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
    ".cls_token": ".embeddings.class_embedding",
    ".pos_embed": ".embeddings.position_embedding",
    ".blocks.": ".encoder.layers.",
    ".norm": ".layer_norm",
    ".patch_embed.proj.": ".embeddings.patch_embedding.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
REWARD_MEAN, REWARD_STD, REWARD_TOKENS = 0.16717362830052426, 1.0333394966054072, 35


def imagereward_to_blip(state: dict) -> dict:
    """ImageReward.pt -> ImageReward.state_dict(): both encoders and the head."""
    out = {}
    for key, value in state.items():
        for old, new in BLIP_NAMES.items():
            key = key.replace(old, new)
        # what is left out: BLIP's contrastive projections
        if key.startswith(("vision.", "text.", "head.")) and not key.endswith("position_ids"):
            out[key] = value
    return out


class ImageReward(nn.Module):
    """BERT over the prompt, attending to the ViT's tokens, and five Linears on [CLS]."""

    def __init__(self, vision: dict, text: dict):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        sizes = (text["hidden_size"], 1024, 128, 64, 16, 1)
        # the numbers between are Dropout: not built, so that none can be left on
        self.head = nn.ModuleDict({i: nn.Linear(a, b) for i, a, b in zip("02467", sizes, sizes[1:])})

    def forward(self, images, ids, mask):
        """(B, 3, 224, 224), CLIP-normalised; ids and mask (B, 35) -> (B,) standardised."""
        context = self.vision(images).last_hidden_state
        # is_decoder=True here would mask the text causally
        text = self.text(ids, attention_mask=mask, encoder_hidden_states=context, is_decoder=False)
        x = text.last_hidden_state[:, 0]
        for linear in self.head.values():
            x = linear(x)
        return (x[:, 0].to(wide(x.dtype)) - REWARD_MEAN) / REWARD_STD


def imagereward(name, device, dtype, places):
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(places["tokenizer"])
    weights = imagereward_to_blip(read_checkpoint(places["file"]))
    model = build(lambda: ImageReward(BLIP_VISION, BLIP_TEXT), weights, device, dtype)
    options = {"padding": "max_length", "truncation": True, "max_length": REWARD_TOKENS, "return_tensors": "pt"}

    def fn(images, prompts, metadata):
        text = tokenizer(prompts, **options).to(device)
        x = clip_input(images.to(device), BLIP_VISION["image_size"]).to(dtype)
        return model(x, text.input_ids, text.attention_mask)

    return fn
