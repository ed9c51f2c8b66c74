"""What every parameter of eight architectures is, written by hand from the papers that define them.

One line: names, role, place on the residual branches, m_in, m_out at four times the width. A name's braces are alternatives.
The place is ``-`` (on the stream, or outside of all blocks), ``in`` (on a residual branch) or ``end`` (carries a factor into
where a branch is added). ``tied`` marks an embedding that is also the readout, then what carries a factor into the readout.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["CARRIERS", "CONSTANTS", "GOLDEN", "Golden", "read"]


@dataclass(frozen=True)
class Golden:
    """What one parameter is."""

    role: str
    place: str
    m_in: float
    m_out: float
    tied: bool = False


# Radford et al. 2019: pre-norm blocks, one fused projection for q, k, v; tied; transformers keeps matrices as (in, out).
GPT2 = """
transformer.wte.weight                                  input   -    1 4  tied
transformer.wpe.weight                                  input   -    1 4
transformer.h.{0,1}.ln_{1,2}.{weight,bias}              vector  in   1 4
transformer.h.{0,1}.attn.c_attn.weight                  hidden  in   4 4
transformer.h.{0,1}.attn.c_attn.bias                    vector  in   1 4
transformer.h.{0,1}.attn.c_proj.weight                  hidden  end  4 4
transformer.h.{0,1}.attn.c_proj.bias                    vector  end  1 4
transformer.h.{0,1}.mlp.c_fc.weight                     hidden  in   4 4
transformer.h.{0,1}.mlp.c_fc.bias                       vector  in   1 4
transformer.h.{0,1}.mlp.c_proj.weight                   hidden  end  4 4
transformer.h.{0,1}.mlp.c_proj.bias                     vector  end  1 4
transformer.ln_f.{weight,bias}                          vector  -    1 4
"""

# 2302.13971 and GQA 2305.13245: q, k, v of their own, gated FFN, RMSNorm, an untied head; key-value heads grow along.
LLAMA = """
model.embed_tokens.weight                                           input   -    1 4
model.layers.{0,1}.{input_layernorm,post_attention_layernorm}.weight vector in   1 4
model.layers.{0,1}.self_attn.{q,k,v}_proj.weight                    hidden  in   4 4
model.layers.{0,1}.self_attn.o_proj.weight                          hidden  end  4 4
model.layers.{0,1}.mlp.{gate,up}_proj.weight                        hidden  in   4 4
model.layers.{0,1}.mlp.down_proj.weight                             hidden  end  4 4
model.norm.weight                                                   vector  -    1 4
lm_head.weight                                                      output  -    4 1
"""

# A fixed number of key-value heads: what k and v make does not grow, and is no logit.
LLAMA_FIXED_KV = (
    LLAMA.replace("{q,k,v}_proj", "q_proj")
    + """
model.layers.{0,1}.self_attn.{k,v}_proj.weight                      bottleneck  in   4 1
"""
)

# 2401.04088: the router's softmax weighs the experts, so it makes logits; experts are stacks of Llama's FFN.
MIXTRAL = (
    "\n".join(line for line in LLAMA.splitlines() if ".mlp." not in line)
    + """
model.layers.{0,1}.mlp.gate.weight                                  output  in   4 1
model.layers.{0,1}.mlp.experts.gate_up_proj                         hidden  in   4 4
model.layers.{0,1}.mlp.experts.down_proj                            hidden  end  4 4
"""
)

# 1810.04805: post-norm, so norms stand on the stream; the head is dense, GELU, norm, the tied matrix, a bias per word.
BERT = """
bert.embeddings.word_embeddings.weight                              input   -    1 4  tied
bert.embeddings.{position,token_type}_embeddings.weight             input   -    1 4
bert.embeddings.LayerNorm.{weight,bias}                             vector  -    1 4
bert.encoder.layer.{0,1}.attention.self.{query,key,value}.weight    hidden  in   4 4
bert.encoder.layer.{0,1}.attention.self.{query,key,value}.bias      vector  in   1 4
bert.encoder.layer.{0,1}.{attention.output,output}.dense.weight     hidden  end  4 4
bert.encoder.layer.{0,1}.{attention.output,output}.dense.bias       vector  end  1 4
bert.encoder.layer.{0,1}.{attention.output,output}.LayerNorm.{weight,bias} vector - 1 4
bert.encoder.layer.{0,1}.intermediate.dense.weight                  hidden  in   4 4
bert.encoder.layer.{0,1}.intermediate.dense.bias                    vector  in   1 4
cls.predictions.transform.dense.weight                              hidden  -    4 4
cls.predictions.transform.dense.bias                                vector  -    1 4
cls.predictions.transform.LayerNorm.{weight,bias}                   vector  -    1 4
cls.predictions.bias                                                finite  -    1 1
"""

# 2010.11929: patches, a token and a table of positions enter; pre-norm; one linear classifier.
VIT = """
vit.embeddings.cls_token                                            vector  -    1 4
vit.embeddings.position_embeddings                                  input   -    1 4
vit.embeddings.patch_embeddings.projection.weight                   input   -    1 4
vit.embeddings.patch_embeddings.projection.bias                     vector  -    1 4
vit.layers.{0,1}.layernorm_{before,after}.{weight,bias}             vector  in   1 4
vit.layers.{0,1}.attention.{q,k,v}_proj.weight                      hidden  in   4 4
vit.layers.{0,1}.attention.{q,k,v}_proj.bias                        vector  in   1 4
vit.layers.{0,1}.{attention.o_proj,mlp.fc2}.weight                  hidden  end  4 4
vit.layers.{0,1}.{attention.o_proj,mlp.fc2}.bias                    vector  end  1 4
vit.layers.{0,1}.mlp.fc1.weight                                     hidden  in   4 4
vit.layers.{0,1}.mlp.fc1.bias                                       vector  in   1 4
vit.layernorm.{weight,bias}                                         vector  -    1 4
classifier.weight                                                   output  -    4 1
classifier.bias                                                     finite  -    1 1
"""

# 1910.10683: one matrix embeds, for both stacks, and reads out after · d^-½; the table of relative positions has a row per
# distance and an entry per head, and one serves all layers of a stack, so it is no block's own.
T5 = """
shared.weight                                                                        input  -    1 4  tied
{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight       input  -    1 4
{encoder,decoder}.block.{0,1}.layer.0.layer_norm.weight                              vector in   1 4
{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v}.weight                   hidden in   4 4
{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.o.weight                         hidden end  4 4
decoder.block.{0,1}.layer.1.layer_norm.weight                                        vector in   1 4
decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v}.weight                           hidden in   4 4
decoder.block.{0,1}.layer.1.EncDecAttention.o.weight                                 hidden end  4 4
encoder.block.{0,1}.layer.1.layer_norm.weight                                        vector in   1 4
decoder.block.{0,1}.layer.2.layer_norm.weight                                        vector in   1 4
encoder.block.{0,1}.layer.1.DenseReluDense.wi.weight                                 hidden in   4 4
decoder.block.{0,1}.layer.2.DenseReluDense.wi.weight                                 hidden in   4 4
encoder.block.{0,1}.layer.1.DenseReluDense.wo.weight                                 hidden end  4 4
decoder.block.{0,1}.layer.2.DenseReluDense.wo.weight                                 hidden end  4 4
{encoder,decoder}.final_layer_norm.weight                                            vector -    1 4
"""

# 2312.00752: a depthwise convolution and per-channel state tables meet channels one by one; Δ, B and C come from a projection
# to a size that stays (rank + 2 · state), Δ goes back up from its rank.
MAMBA = """
backbone.embeddings.weight                              input       -    1 4  tied
backbone.layers.{0,1}.norm.weight                       vector      in   1 4
backbone.layers.{0,1}.mixer.in_proj.weight              hidden      in   4 4
backbone.layers.{0,1}.mixer.conv1d.weight               input       in   1 4
backbone.layers.{0,1}.mixer.conv1d.bias                 vector      in   1 4
backbone.layers.{0,1}.mixer.x_proj.weight               bottleneck  in   4 1
backbone.layers.{0,1}.mixer.dt_proj.weight              input       in   1 4
backbone.layers.{0,1}.mixer.dt_proj.bias                vector      in   1 4
backbone.layers.{0,1}.mixer.A_log                       input       in   1 4
backbone.layers.{0,1}.mixer.D                           vector      in   1 4
backbone.layers.{0,1}.mixer.out_proj.weight             hidden      end  4 4
backbone.norm_f.weight                                  vector      -    1 4
"""

# 1512.03385: two convolutions with BatchNorm per block, so the last norm ends the branch. The first block of the second stage
# projects its shortcut: there is one per stage at any depth, and its sum has no stream of which the other side is made.
RESNET = """
resnet.embedder.embedder.convolution.weight                                             input   -    1 4
resnet.embedder.embedder.normalization.{weight,bias}                                    vector  -    1 4
resnet.encoder.stages.{0.layers.0,0.layers.1,1.layers.1}.layer.{0,1}.convolution.weight hidden  in   4 4
resnet.encoder.stages.{0.layers.0,0.layers.1,1.layers.1}.layer.0.normalization.{weight,bias} vector in 1 4
resnet.encoder.stages.{0.layers.0,0.layers.1,1.layers.1}.layer.1.normalization.{weight,bias} vector end 1 4
resnet.encoder.stages.1.layers.0.{layer.0,layer.1,shortcut}.convolution.weight          hidden  -    4 4
resnet.encoder.stages.1.layers.0.{layer.0,layer.1,shortcut}.normalization.{weight,bias} vector  -    1 4
classifier.1.weight                                                                     output  -    4 1
classifier.1.bias                                                                       finite  -    1 1
"""

GOLDEN = {
    "gpt2": GPT2, "llama": LLAMA, "llama+fixed kv": LLAMA_FIXED_KV, "mixtral": MIXTRAL, "bert": BERT, "vit": VIT, "t5": T5,
    "mamba": MAMBA, "resnet": RESNET,
}  # fmt: skip

# What carries a factor into a readout that is tied.
CARRIERS = {
    "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    "bert": {"cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"},
    "t5": {"decoder.final_layer_norm.weight"},
    "mamba": {"backbone.norm_f.weight"},
}

# Powers of the width in numbers of the forward pass, and the parameter on which they can be written.
CONSTANTS = {"t5": {"decoder.final_layer_norm.weight": -0.5}}


def read(table: str) -> dict[str, Golden]:
    """Return what a table says of every parameter, by name."""
    found = {}
    for line in filter(None, table.splitlines()):
        names, role, place, m_in, m_out, *tied = line.split()
        for name in _names(names):
            assert name not in found, f"{name} is there twice"
            found[name] = Golden(role, place, float(m_in), float(m_out), bool(tied))
    return found


def _names(pattern: str) -> Iterator[str]:
    """Return all names of a pattern with braces."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return map("".join, itertools.product(*choices))
