"""The autoregressive video model: token ids in, next-token losses or logits out (spec/model.md)."""

from __future__ import annotations

import copy

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.model.loss import TokenLosses, vocab_parallel_losses
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.model.rotary import rotary_angles
from cosmos_mcore.model.sequence import zigzag_slice


class CosmosARModel(LanguageModule):
    """Embedding, Megatron ``TransformerBlock`` with 3-D rotary angles, output layer; one pipeline stage of them.

    Args:
        config: Megatron's config, as ``builder.transformer_config`` makes it.
        arch: sizes that Megatron's config has no field for (vocabulary, rotary base, YaRN).
        spec: the layers of this stage.
        layout: how a clip lies in the sequence; fixes the rotary angles.
        pre_process: this stage embeds the tokens.
        post_process: this stage computes logits and losses.
        vp_stage: virtual pipeline stage of this chunk.
    """

    def __init__(
        self,
        config: TransformerConfig,
        arch: ModelArch,
        spec: TransformerBlockSubmodules,
        layout: VideoLayout,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.arch = arch
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                arch.embedding_size,
                layout.padded_sequence_length,
                position_embedding_type="none",
                tp_group=self.pg_collection.tp,
            )
        self.decoder = TransformerBlock(
            config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=self.pg_collection,
        )
        if post_process:
            # Megatron's own layer fuses gradient accumulation only with Apex.
            plain = copy.copy(config)
            plain.gradient_accumulation_fusion = False
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                arch.vocab_size,
                config=plain,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=self.pg_collection.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        angles = rotary_angles(arch, layout.latent_shape, layout.begin_of_video, layout.padded_sequence_length)
        self.register_buffer("rotary_angles", angles, persistent=False)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Takes the hidden states of the stage before; Megatron's pipeline schedule calls it."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor | TokenLosses:
        """Runs this stage.

        Args:
            tokens: [B, S] int64. In training S is the padded length (under context parallelism: this rank's slice of
                it, in zig-zag order).
            labels: [B, S] int64, the next token of every position; None: return logits.
            context: text embeddings [text length, B, context size] of a text-to-video model, of any float dtype, on
                every stage.

        Returns:
            Hidden states [S, B, hidden] on stages before the last; there ``TokenLosses`` if labels are given, else this
            rank's part of the logits [S, B, V / TP] in the model's dtype.
        """
        hidden = self.embedding(tokens, None) if self.pre_process else None
        if context is not None:
            context = context.to(self.config.params_dtype)
        hidden = self.decoder(
            hidden,
            None,
            context=context,
            rotary_pos_emb=self._angles(tokens.size(1)),
        )
        if not self.post_process:
            return hidden
        logits, _ = self.output_layer(hidden)
        if labels is None:
            return logits
        return vocab_parallel_losses(logits, labels, self.pg_collection.tp)

    def _angles(self, length: int) -> Tensor:
        group = self.pg_collection.cp
        if group.size() > 1:
            return zigzag_slice(self.rotary_angles, group.rank(), group.size())
        return self.rotary_angles[:length]
