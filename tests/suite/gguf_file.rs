//! Writes GGUF files.

use fastrand::Rng;

pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const Q8_0: u32 = 8;
pub const Q4_K: u32 = 12;
pub const Q5_K: u32 = 13;
pub const Q6_K: u32 = 14;
pub const MXFP4: u32 = 39;

/// A value of metadata: its type and bytes.
#[derive(Clone)]
pub struct Value(pub u32, pub Vec<u8>);

impl Value {
    pub fn u16(value: u16) -> Self {
        Self(2, value.to_le_bytes().to_vec())
    }

    pub fn u32(value: u32) -> Self {
        Self(4, value.to_le_bytes().to_vec())
    }

    pub fn text(value: &str) -> Self {
        Self(8, text(value))
    }

    /// An array of values of one type.
    pub fn array(kind: u32, values: &[Self]) -> Self {
        let mut bytes = [kind.to_le_bytes().as_slice(), &(values.len() as u64).to_le_bytes()].concat();
        bytes.extend(values.iter().flat_map(|value| &value.1));
        Self(9, bytes)
    }
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// As ggml has them: innermost first.
    pub sizes: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

/// A file of the third version.
#[derive(Clone)]
pub struct File {
    pub alignment: usize,
    pub keys: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

impl File {
    pub fn new() -> Self {
        let tokens = Value::array(8, &[Value::text("a"), Value::text("")]);
        let keys = [
            ("general.architecture", Value::text("test")),
            ("tokenizer.ggml.tokens", tokens),
            ("tokenizer.ggml.scores", Value::array(6, &[Value(6, vec![0; 4])])),
            ("test.flag", Value(7, vec![1])),
            ("test.count", Value(10, vec![1; 8])),
        ];
        let keys = keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { alignment: 32, keys, tensors: Vec::new() }
    }

    pub fn key(mut self, key: &str, value: Value) -> Self {
        self.keys.push((key.into(), value));
        self
    }

    /// Adds a tensor; `shape` is outermost first.
    pub fn add(&mut self, name: &str, shape: &[usize], kind: u32, bytes: Vec<u8>) {
        let sizes = shape.iter().rev().map(|size| *size as u64).collect();
        self.tensors.push(Tensor { name: name.into(), sizes, kind, bytes });
    }

    pub fn add_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        self.add(name, shape, F32, values.iter().flat_map(|value| value.to_le_bytes()).collect());
    }

    /// Adds a tensor of random blocks.
    pub fn add_random(&mut self, name: &str, shape: &[usize], kind: u32, rng: &mut Rng) {
        let elements: usize = shape.iter().product();
        let bytes = match kind {
            F32 => (0..elements).flat_map(|_| (rng.f32() - 0.5).to_le_bytes()).collect(),
            _ => (0..elements / block_size(kind)).flat_map(|_| block(kind, rng)).collect(),
        };
        self.add(name, shape, kind, bytes);
    }

    /// The file's bytes.
    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, Value(kind, bytes)) in &self.keys {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            out.extend(text(&tensor.name));
            out.extend((tensor.sizes.len() as u32).to_le_bytes());
            out.extend(tensor.sizes.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + tensor.bytes.len()).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.bytes);
        }
        out
    }
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

pub fn block_size(kind: u32) -> usize {
    match kind {
        Q8_0 | MXFP4 => 32,
        Q4_K | Q6_K => 256,
        other => panic!("type {other}"),
    }
}

/// Random codes, and scales of ordinary size.
fn block(kind: u32, rng: &mut Rng) -> Vec<u8> {
    let half = |rng: &mut Rng| (rng.u16(0x1c00..0x2c00) | rng.u16(0..2) << 15).to_le_bytes();
    let codes = |count: usize, rng: &mut Rng| -> Vec<u8> { (0..count).map(|_| rng.u8(..)).collect() };
    match kind {
        Q8_0 => [&half(rng)[..], &codes(32, rng)].concat(),
        // d, dmin, twelve bytes of scales, codes.
        Q4_K => [&half(rng)[..], &half(rng), &codes(12 + 128, rng)].concat(),
        // Low bits, high bits, scales, d.
        Q6_K => [&codes(128 + 64 + 16, rng)[..], &half(rng)].concat(),
        MXFP4 => [&[rng.u8(110..130)], &codes(16, rng)[..]].concat(),
        other => panic!("type {other}"),
    }
}

/// A layer of Qwen3-MoE: two experts of this size, each matrix of a type.
pub fn qwen(size: usize, [gate, up, down]: [u32; 3], rng: &mut Rng) -> File {
    let mut file = File::new();
    file.add_random("blk.2.ffn_gate_inp.weight", &[2, size], F32, rng);
    file.add_random("blk.2.ffn_gate_exps.weight", &[2, size, size], gate, rng);
    file.add_random("blk.2.ffn_up_exps.weight", &[2, size, size], up, rng);
    file.add_random("blk.2.ffn_down_exps.weight", &[2, size, size], down, rng);
    file
}

/// The config of such a layer.
pub fn qwen_config(size: usize) -> serde_json::Value {
    serde_json::json!({
        "model_type": "qwen3_moe", "hidden_size": size, "moe_intermediate_size": size, "num_experts": 2,
        "num_experts_per_tok": 1, "num_hidden_layers": 4, "hidden_act": "silu", "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    })
}
