//! A small random model of the Llama family as a GGUF file: matrices of every type that such files may have, heads as wide
//! as the kernels for tensor cores want them, and a tokenizer of single bytes.
//!
//! Layout and type numbers: the GGUF specification, version 3.

use ampoule_plan::DType;

use crate::ops::rng::{Rng, Values, random_bytes};

/// Layers, each with matrices of another type.
const TYPES: [DType; 5] = [DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::F16, DType::F32];
const HIDDEN: usize = 256;
const FEED_FORWARD: usize = 512;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN / HEADS;
/// One a byte, and the end of a text.
const VOCABULARY: usize = 257;

const ALIGNMENT: usize = 32;

enum Meta {
    U32(u32),
    F32(f32),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i32>),
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Meta {
    /// Type number and value.
    fn write(&self, out: &mut Vec<u8>) {
        let number: u32 = match self {
            Self::U32(_) => 4,
            Self::F32(_) => 6,
            Self::Text(_) => 8,
            Self::Texts(_) | Self::Ints(_) => 9,
        };
        out.extend(number.to_le_bytes());
        match self {
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Text(text) => push_text(out, text),
            Self::Texts(texts) => {
                out.extend(8_u32.to_le_bytes());
                out.extend((texts.len() as u64).to_le_bytes());
                for text in texts {
                    push_text(out, text);
                }
            }
            Self::Ints(values) => {
                out.extend(5_u32.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }
}

const fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 8,
        DType::BF16 => 30,
        DType::I32 | DType::U32 | DType::U8 => panic!("no type of weights"),
    }
}

/// The character that stands for each byte in vocabularies of GPT-2's kind: itself where it prints, else one from 256 on.
fn byte_tokens() -> Vec<String> {
    let mut next = 256;
    let mut character = |byte: u32| {
        if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            return char::from_u32(byte);
        }
        next += 1;
        char::from_u32(next - 1)
    };
    (0..256).filter_map(&mut character).map(String::from).collect()
}

fn metadata() -> Vec<(&'static str, Meta)> {
    let count = |n: usize| Meta::U32(n as u32);
    let mut tokens = byte_tokens();
    tokens.push("<|end|>".to_owned());
    let mut types = vec![1; VOCABULARY];
    types[VOCABULARY - 1] = 3;
    vec![
        ("general.architecture", Meta::Text("llama".to_owned())),
        ("general.name", Meta::Text("random llama".to_owned())),
        ("general.alignment", count(ALIGNMENT)),
        ("llama.context_length", count(8192)),
        ("llama.embedding_length", count(HIDDEN)),
        ("llama.block_count", count(TYPES.len())),
        ("llama.feed_forward_length", count(FEED_FORWARD)),
        ("llama.attention.head_count", count(HEADS)),
        ("llama.attention.head_count_kv", count(KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("llama.rope.freq_base", Meta::F32(10_000.0)),
        ("tokenizer.ggml.model", Meta::Text("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Meta::Text("smollm".to_owned())),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type", Meta::Ints(types)),
        ("tokenizer.ggml.merges", Meta::Texts(Vec::new())),
        ("tokenizer.ggml.eos_token_id", count(VOCABULARY - 1)),
    ]
}

/// Name, rows and columns, element type.
fn tensors() -> Vec<(String, Vec<usize>, DType)> {
    let mut all = vec![
        ("token_embd.weight".to_owned(), vec![VOCABULARY, HIDDEN], DType::F16),
        ("output_norm.weight".to_owned(), vec![HIDDEN], DType::F32),
        ("output.weight".to_owned(), vec![VOCABULARY, HIDDEN], DType::BF16),
    ];
    for (layer, dtype) in TYPES.into_iter().enumerate() {
        let mut add = |name: &str, shape: Vec<usize>| {
            let dtype = if shape.len() == 1 { DType::F32 } else { dtype };
            all.push((format!("blk.{layer}.{name}.weight"), shape, dtype));
        };
        add("attn_norm", vec![HIDDEN]);
        add("attn_q", vec![HEADS * HEAD_DIM, HIDDEN]);
        add("attn_k", vec![KV_HEADS * HEAD_DIM, HIDDEN]);
        add("attn_v", vec![KV_HEADS * HEAD_DIM, HIDDEN]);
        add("attn_output", vec![HIDDEN, HEADS * HEAD_DIM]);
        add("ffn_norm", vec![HIDDEN]);
        add("ffn_gate", vec![FEED_FORWARD, HIDDEN]);
        add("ffn_up", vec![FEED_FORWARD, HIDDEN]);
        add("ffn_down", vec![HIDDEN, FEED_FORWARD]);
    }
    all
}

/// The bytes of the file.
pub fn gguf(seed: u64) -> Vec<u8> {
    let (metadata, tensors) = (metadata(), tensors());
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in &metadata {
        push_text(&mut out, key);
        value.write(&mut out);
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, shape, dtype) in &tensors {
        push_text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        // Innermost first.
        out.extend(shape.iter().rev().flat_map(|&dim| (dim as u64).to_le_bytes()));
        out.extend(type_number(*dtype).to_le_bytes());
        data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        out.extend((data.len() as u64).to_le_bytes());
        let elements: usize = shape.iter().product();
        let values = match shape[..] {
            [_] => Values::Uniform(0.8, 1.2),
            // Outputs of about the variance of the inputs.
            [_, columns] if name != "token_embd.weight" => {
                Values::Normal((columns as f32).sqrt().recip())
            }
            _ => Values::Normal(0.5),
        };
        data.extend(random_bytes(&mut Rng::new(seed, name), *dtype, elements, values));
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out.extend(data);
    out
}
