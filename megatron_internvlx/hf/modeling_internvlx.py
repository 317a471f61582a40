"""InternVL-X with layer-wise token compression (remote code of this directory).

Visual tokens are few in the shallow layers. At the entry of `expand_layer` the token grid of every
tile is upsampled and a projection of the vision features is added; later injection layers add theirs.
The two phases therefore have different lengths, positions and masks, and so have their caches.

Shapes: B rows, n new tokens of a row in the deep phase, s in the shallow phase, T tiles, p and q tokens of
a tile in the two phases, h width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_internvlx import InternVLXConfig
from .decoder_internvlx import Decoder, Phase, RMSNorm
from .vision_internvlx import PVTC, VisionEmbeddings, VisionLayer, VisionModel, make_projector


def upsample_matrix(low, high, mode):
    """The linear map from a low x low to a high x high grid: [high*high, low*low]."""
    grids = torch.eye(low * low).view(low * low, 1, low, low)
    options = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(grids, size=(high, high), mode=mode, **options).view(low * low, high * high).t()


class InternVLXForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images and text to text. `generate` works with batches (left padding), several images and rounds."""

    config_class = InternVLXConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["DecoderLayer", "VisionLayer"]  # noqa: RUF012
    _supports_sdpa = True
    # Their lengths differ between layers, which caches of one fixed length cannot hold.
    _can_compile_fullgraph = False
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = VisionModel(config.vision_config, config.select_layer)
        self.pvtc = config.compression["projector"] == "pvtc"
        name = "projector" if self.pvtc else "mlp1"
        self.add_module(name, make_projector(config, config.low_grid))
        self.lvtc_projectors = nn.ModuleDict(
            {str(layer): make_projector(config, config.high_grid) for layer in config.injection_layers}
        )
        self.language_model = Decoder(config.llm_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.llm_config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            bias = getattr(module, "bias", None)
            if isinstance(bias, torch.Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PVTC):
            nn.init.normal_(module.cls_scale)
        elif isinstance(module, VisionLayer):
            for factor in (module.ls1, module.ls2):
                nn.init.constant_(factor, self.config.vision_config.initializer_factor)
        elif isinstance(module, VisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=std)
            nn.init.normal_(module.position_embedding, std=std)

    def get_input_embeddings(self):
        """The token embedding."""
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self):
        """The output layer."""
        return self.language_model.lm_head

    def set_output_embeddings(self, value):
        """Replace the output layer."""
        self.language_model.lm_head = value

    @property
    def tokens_per_tile(self):
        """Image placeholders that stand for one tile in `input_ids`."""
        return self.config.high_grid**2

    def forward(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **_kwargs,
    ):
        """Run new tokens after those in the cache.

        Args:
            input_ids: [B, n], `tokens_per_tile` image placeholders per tile.
            pixel_values: [T, 3, S, S], the tiles of all new placeholders, row by row.
            attention_mask: [B, cached + n], 0 at padding (left or right); None: no padding.
            past_key_values: a DynamicCache, filled in place.
            labels: [B, n], -100 where nothing is supervised; not shifted.
            use_cache: make a cache if there is none.
            logits_to_keep: only so many last positions get logits; 0: all.

        Raises:
            ValueError: placeholders and tiles do not fit, or a cache is static or lacks its shallow mask.
        """
        use_cache = self.config.llm_config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        if cache is not None and any(getattr(layer, "is_compileable", False) for layer in cache.layers):
            raise ValueError(
                "shallow and deep layers have caches of different lengths, which a static cache cannot hold: "
                "leave cache_implementation out"
            )
        if cache is None and use_cache and labels is None:
            cache = DynamicCache()
        batch, new = input_ids.shape
        cached = deep_length(cache)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, cached + new)
        valid = attention_mask.bool()
        visual = (input_ids == self.config.image_token_id) & valid[:, -new:]
        features = self.encode(pixel_values, visual)
        x = self._decode(input_ids, valid, visual, features, cache)
        keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = self.language_model.lm_head(self.language_model.model.norm(x[:, keep]))
        loss = None
        if labels is not None:
            targets = labels[:, keep][:, 1:].reshape(-1)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def encode(self, pixel_values, visual):
        """Vision features [T, L, c] for the placeholders [B, n] of this call; None without any."""
        count, tiles = int(visual.sum()), 0 if pixel_values is None else len(pixel_values)
        if count != tiles * self.tokens_per_tile:
            raise ValueError(
                f"{count} image placeholders for {tiles} tiles of {self.tokens_per_tile} tokens each"
            )
        return self.vision_model(pixel_values) if tiles else None

    def _entry_projector(self):
        return self.projector if self.pvtc else self.mlp1

    def _decode(self, input_ids, valid, visual, features, cache):
        """Both phases: hidden states of the new tokens [B, n, h]."""
        model, first = self.language_model.model, (self.config.injection_layers or [0])[0]
        new, dtype = input_ids.shape[1], model.norm.weight.dtype
        x = model.embed_tokens(input_ids)
        deep = Phase(valid, new, self.config.llm_config, dtype)
        if not self.config.injection_layers:
            if features is not None:
                x = x.masked_scatter(visual[..., None], self._entry_projector()(features).to(x.dtype))
        else:
            x = self._shallow(x, valid[:, -new:], visual, features, cache)
        for index, layer in enumerate(model.layers):
            if index < first:
                continue
            if index > first and features is not None and str(index) in self.lvtc_projectors:
                added = self.lvtc_projectors[str(index)](features).to(x.dtype)
                x = x + torch.zeros_like(x).masked_scatter(visual[..., None], added)
            x = layer(x, deep, cache)
        return x

    def _shallow(self, x, valid, visual, features, cache):
        """Embeddings [B, n, h] through the shallow layers and the expansion: [B, n, h]."""
        low, high = self.config.low_grid**2, self.config.high_grid**2
        rank_in_tile = (visual.long().cumsum(dim=1) - 1) % high
        kept = valid & (~visual | (rank_in_tile < low))
        size = max(int(kept.sum(dim=1).max()), 1)
        # Kept rows move to the right end in their order; what is left of them is padding.
        source = torch.argsort(kept.int(), dim=1, stable=True)[:, -size:]
        shallow_valid = kept.gather(1, source)
        is_visual = visual.gather(1, source) & shallow_valid
        index = source[..., None].expand(-1, -1, x.shape[-1])
        rows = x.gather(1, index)
        if features is not None:
            rows = rows.masked_scatter(is_visual[..., None], self._entry_projector()(features).to(x.dtype))
        seen = shallow_mask(cache, shallow_valid, visual.shape[1])
        phase = Phase(seen, size, self.config.llm_config, self.language_model.model.norm.weight.dtype)
        first = self.config.injection_layers[0]
        for layer in self.language_model.model.layers[:first]:
            rows = layer(rows, phase, cache)
        # Padding rows land on rows that are padding or visual; those are masked, or replaced here.
        x = torch.zeros_like(x).scatter(1, index, rows)
        if features is not None:
            up = upsample_matrix(
                self.config.low_grid, self.config.high_grid, self.config.compression["upsample"]
            )
            tiles = rows[is_visual].view(len(features), low, -1)
            grown = torch.matmul(up.to(rows), tiles) + self.lvtc_projectors[str(first)](features).to(
                rows.dtype
            )
            x = x.masked_scatter(visual[..., None], grown)
        return x

    # ------------------------------------------------------------------------------ generation

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        pixel_values=None,
        use_cache=True,
        **kwargs,
    ):
        """What is not in the cache yet, with the tiles of its placeholders."""
        seen = deep_length(past_key_values)
        # With a cache the caller may give all ids, or only the new ones with a mask of full length.
        whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        start = seen if whole else 0
        inputs = {
            "input_ids": input_ids[:, start:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "pixel_values": self._new_tiles(input_ids, start, pixel_values),
        }
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        return inputs

    def _new_tiles(self, input_ids, start, pixel_values):
        """Of the tiles of all placeholders those at or after position `start`; None if there are none."""
        if pixel_values is None:
            return None
        visual = input_ids == self.config.image_token_id
        total = visual.sum(dim=1) // self.tokens_per_tile
        new = visual[:, start:].sum(dim=1) // self.tokens_per_tile
        if int(new.sum()) == 0:
            return None
        if len(pixel_values) != int(total.sum()) or int(new.sum()) == int(total.sum()):
            return pixel_values
        keep = [torch.arange(int(t)) >= int(t - n) for t, n in zip(total, new, strict=True)]
        return pixel_values[torch.cat(keep).to(pixel_values.device)]

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        """Repeat every row; its tiles are repeated with it, not one by one."""
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1 and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(dim=1) // self.tokens_per_tile
            rows = pixels.split(counts.tolist())
            pixels = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        return input_ids, model_kwargs


def deep_length(cache):
    """Positions that the cache holds in the deep phase."""
    if cache is None or not len(cache.layers):
        return 0
    return cache.get_seq_length(len(cache.layers) - 1)


def shallow_mask(cache, new, deep):
    """Validity [B, cached + s] of the shallow rows; the cache remembers it for the next call.

    With it the cache remembers how long its deep layers will be after `deep` new rows. Whoever takes rows
    out of it, as assisted decoding does, takes as many out of layers that hold fewer; that is refused. A beam
    search reorders rows among copies of the same prompt, whose masks are equal.
    """
    if cache is None:
        return new
    length = cache.get_seq_length(0)
    before = getattr(cache, "shallow_mask", None)
    if length == 0:
        before = new.new_zeros(len(new), 0)
    elif before is None:
        raise ValueError("the cache was not filled by this model: it lacks the mask of its shallow layers")
    elif before.shape[1] != length or cache.deep_rows != deep_length(cache):
        raise ValueError(
            "rows were taken out of the cache, whose layers differ in length: assisted decoding and prompt "
            "lookup do not work with this model"
        )
    elif len(before) != len(new):
        before = before.repeat_interleave(len(new) // len(before), dim=0)
    cache.shallow_mask = torch.cat([before, new], dim=1)
    cache.deep_rows = deep_length(cache) + deep
    return cache.shallow_mask
