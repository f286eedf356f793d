//! Checkpoints that tests change and open.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use moewe::Checkpoint;
use moewe::families::{Request, Resolved, resolve};
use moewe::spec::{ActivationQuant, FloatType};
use moewe::weights::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value};

/// What every test asks for, unless it says so.
pub const ANY: Request =
    Request { layer: None, input: FloatType::Bf16, output: FloatType::F32, activations: ActivationQuant::None };

/// A folder of `tests/golden`.
pub fn golden(case: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(case)
}

/// A tensor in memory.
#[derive(Clone)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A checkpoint in memory.
#[derive(Clone)]
pub struct Sample {
    pub config: Map<String, Value>,
    pub tensors: BTreeMap<String, Stored>,
}

impl Sample {
    /// A copy of a golden case.
    pub fn golden(case: &str) -> Self {
        let checkpoint = Checkpoint::open(&golden(case)).unwrap();
        let tensors = checkpoint.names().map(|name| {
            let tensor = checkpoint.tensor(name).unwrap();
            (name.to_owned(), Stored { dtype: tensor.dtype, shape: tensor.shape, bytes: tensor.bytes.to_vec() })
        });
        Self { config: checkpoint.config().clone(), tensors: tensors.collect() }
    }

    /// Writes a key of `config.json`.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config.insert(key.into(), value.into());
        self
    }

    /// Removes a key of `config.json`.
    pub fn unset(mut self, key: &str) -> Self {
        self.config.shift_remove(key).unwrap();
        self
    }

    /// Adds a tensor of zeros.
    pub fn zeros(mut self, name: &str, dtype: Dtype, shape: &[usize]) -> Self {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
        self.tensors.insert(name.into(), Stored { dtype, shape: shape.to_vec(), bytes });
        self
    }

    /// Takes a tensor out.
    pub fn take(&mut self, name: &str) -> Stored {
        self.tensors.remove(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// Renames tensors.
    pub fn rename(mut self, rename: impl Fn(&str) -> String) -> Self {
        self.tensors = self.tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        self
    }

    /// The bytes of one safetensors file with all tensors.
    pub fn file(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, Stored { dtype, shape, bytes })| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    pub fn open(&self) -> Checkpoint {
        open(&Value::Object(self.config.clone()).to_string(), self.file()).unwrap()
    }

    pub fn resolve(&self) -> moewe::Result<Resolved> {
        resolve(&self.open(), &ANY)
    }

    /// The message of the refusal.
    pub fn refusal(&self) -> String {
        self.resolve().expect_err("must be refused").to_string()
    }
}

/// A checkpoint of one shard in memory.
pub fn open(config: &str, file: Vec<u8>) -> moewe::Result<Checkpoint> {
    Checkpoint::from_bytes(config, vec![("weights.safetensors".into(), Cow::Owned(file))])
}

/// Asserts that `text` has each of `parts`.
#[track_caller]
pub fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}
