//! `io.safetensors` of a golden case: inputs and expected outputs.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use moewe::spec::FloatType;
use moewe::weights::Dtype;
use moewe::{Checkpoint, Error, Result, Tensor};

use crate::cases::IO;

/// The file.
pub struct CaseFile {
    tensors: Checkpoint,
    place: String,
}

/// The tensors of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `t{T}.`, or nothing.
    prefix: String,
    /// T.
    pub tokens: usize,
}

/// What the tool does with a tensor of a batch.
enum Role {
    /// It reads it or compares with it.
    Used,
    /// Nobody judges it: `router_logits` by definition.
    Exempt,
    /// It has no use for it yet.
    Unused,
}

fn role(name: &str) -> Role {
    match name {
        "hidden_states"
        | "input_ids"
        | "expert_hidden_states"
        | "router_states_in"
        | "topk_ids"
        | "topk_weights"
        | "shared_gammas"
        | "router_states_out"
        | "output"
        | "output_dequant"
        | "output_w8a8"
        | "input_codes_w8a8"
        | "input_scales_w8a8"
        | "flip_sensitive_w8a8"
        | "output_w8a8_ue8m0"
        | "input_codes_w8a8_ue8m0"
        | "input_scales_w8a8_ue8m0"
        | "flip_sensitive_w8a8_ue8m0" => Role::Used,
        "router_logits" => Role::Exempt,
        _ => Role::Unused,
    }
}

impl CaseFile {
    /// Reads the file of a case.
    ///
    /// # Errors
    /// It is not there, or no safetensors file.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(IO);
        let place = path.display().to_string();
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path, source })?;
        let tensors = Checkpoint::from_bytes("{}", vec![(place.clone(), Cow::Owned(bytes))])?;
        Ok(Self { tensors, place })
    }

    /// What the manifest would call such a case.
    pub fn kind(&self) -> &'static str {
        let any = |end: &str| self.tensors.names().any(|name| name.ends_with(end));
        if self.tensors.tensor("hidden_states").is_some() {
            "routing"
        } else if any(".output_w8a8") {
            "fp8_block"
        } else if any(".output_dequant") {
            "quantised"
        } else {
            "float"
        }
    }

    /// The calls of a layer, by tokens.
    ///
    /// # Errors
    /// There are none.
    pub fn batches(&self) -> Result<Vec<Batch>> {
        let found: BTreeMap<usize, &str> =
            self.tensors.names().filter_map(split).map(|(t, prefix, _)| (t, prefix)).collect();
        if found.is_empty() {
            return Err(self.missing("t{T}.hidden_states"));
        }
        Ok(found.into_iter().map(|(tokens, prefix)| Batch { prefix: prefix.to_owned(), tokens }).collect())
    }

    /// The one call of a router, whose tensors have no prefix.
    ///
    /// # Errors
    /// There is none.
    pub fn router_batch(&self) -> Result<Batch> {
        let hidden_states = self.tensors.tensor("hidden_states").ok_or_else(|| self.missing("hidden_states"))?;
        Ok(Batch { prefix: String::new(), tokens: hidden_states.shape.first().copied().unwrap_or(0) })
    }

    /// Names, without prefix, of the tensors that the tool has no use for.
    pub fn unused(&self, batches: &[Batch]) -> Vec<String> {
        let mut unused: Vec<String> = vec![];
        for full in self.tensors.names() {
            let name = batches.iter().find_map(|batch| full.strip_prefix(&batch.prefix)).unwrap_or(full);
            match role(name) {
                Role::Used | Role::Exempt => {}
                Role::Unused if unused.iter().any(|known| known == name) => {}
                Role::Unused => unused.push(name.to_owned()),
            }
        }
        unused
    }

    /// Type of the hidden states, which all batches share.
    ///
    /// # Errors
    /// They are missing, no floats, or of several types.
    pub fn input_type(&self, batches: &[Batch]) -> Result<FloatType> {
        let mut found = None;
        for batch in batches {
            let tensor = self.required(batch, "hidden_states")?;
            let of_batch = match tensor.dtype {
                Dtype::BF16 => Some(FloatType::Bf16),
                Dtype::F16 => Some(FloatType::F16),
                Dtype::F32 => Some(FloatType::F32),
                _ => None,
            };
            match (of_batch, *found.get_or_insert(of_batch)) {
                (Some(of_batch), Some(first)) if of_batch == first => {}
                (Some(_) | None, _) => {
                    let field = format!("{}.dtype", tensor.name);
                    let expected = "BF16, F16 or F32, the same in all batches";
                    return Err(Error::invalid(field, format!("{:?}", tensor.dtype), expected, "convert the tensor"));
                }
            }
        }
        found.flatten().ok_or_else(|| self.missing("hidden_states"))
    }

    /// The input rows [T, width], widened.
    ///
    /// # Errors
    /// Missing or misshapen.
    pub fn hidden_states(&self, batch: &Batch, width: usize) -> Result<Vec<f32>> {
        self.floats(batch, "hidden_states", width)
    }

    /// The token ids `[T]`, if there are any.
    ///
    /// # Errors
    /// Misshapen or negative.
    pub fn token_ids(&self, batch: &Batch) -> Result<Option<Vec<u32>>> {
        let Some(tensor) = self.tensor(batch, "input_ids") else { return Ok(None) };
        expect_shape(&tensor, &[batch.tokens])?;
        let id = |id: i32| {
            let field = tensor.name.to_string();
            u32::try_from(id).map_err(|_| Error::invalid(field, id, "token ids of at least 0", "correct the tensor"))
        };
        tensor.to_i32(batch.tokens)?.into_iter().map(id).collect::<Result<_>>().map(Some)
    }

    /// An expected tensor [T, width] of ids.
    ///
    /// # Errors
    /// Missing or misshapen.
    pub fn ids(&self, batch: &Batch, name: &str, width: usize) -> Result<Vec<i32>> {
        let tensor = self.required(batch, name)?;
        expect_shape(&tensor, &[batch.tokens, width])?;
        tensor.to_i32(batch.tokens * width)
    }

    /// A tensor [T, width] of floats.
    ///
    /// # Errors
    /// Missing or misshapen.
    pub fn floats(&self, batch: &Batch, name: &str, width: usize) -> Result<Vec<f32>> {
        let tensor = self.required(batch, name)?;
        expect_shape(&tensor, &[batch.tokens, width])?;
        tensor.to_f32(batch.tokens * width)
    }

    /// A tensor [T, width] of floats, if the batch has it.
    ///
    /// # Errors
    /// Misshapen.
    pub fn optional_floats(&self, batch: &Batch, name: &str, width: usize) -> Result<Option<Vec<f32>>> {
        self.tensor(batch, name).map(|_| self.floats(batch, name, width)).transpose()
    }

    /// Bytes [T, width], if the batch has them.
    ///
    /// # Errors
    /// Misshapen.
    pub fn optional_bytes(&self, batch: &Batch, name: &str, width: usize) -> Result<Option<Vec<u8>>> {
        let Some(tensor) = self.tensor(batch, name) else { return Ok(None) };
        // A mark a token has no second dimension.
        let shape: &[usize] = if width == 1 { &[batch.tokens] } else { &[batch.tokens, width] };
        expect_shape(&tensor, shape)?;
        match tensor.dtype {
            Dtype::U8 => Ok(Some(tensor.bytes.to_vec())),
            other => {
                let field = format!("{}.dtype", tensor.name);
                Err(Error::invalid(field, format!("{other:?}"), "U8", "convert the tensor"))
            }
        }
    }

    /// A tensor [T, groups] of floats whatever the number of groups, if the batch has it.
    ///
    /// # Errors
    /// Misshapen.
    pub fn optional_rows(&self, batch: &Batch, name: &str) -> Result<Option<Vec<f32>>> {
        let width = self.tensor(batch, name).and_then(|tensor| tensor.shape.get(1).copied());
        width.map(|width| self.floats(batch, name, width)).transpose()
    }

    /// Whether any batch has a tensor of this name.
    pub fn any(&self, batches: &[Batch], name: &str) -> bool {
        batches.iter().any(|batch| self.tensor(batch, name).is_some())
    }

    /// Which of these a batch has.
    ///
    /// # Errors
    /// None of them.
    pub fn present(&self, batch: &Batch, names: &[&'static str]) -> Result<Vec<&'static str>> {
        let found: Vec<&str> = names.iter().copied().filter(|name| self.tensor(batch, name).is_some()).collect();
        if found.is_empty() { Err(self.missing(&batch.named(&names.join(" or ")))) } else { Ok(found) }
    }

    fn tensor(&self, batch: &Batch, name: &str) -> Option<Tensor<'_>> {
        self.tensors.tensor(&batch.named(name))
    }

    fn required(&self, batch: &Batch, name: &str) -> Result<Tensor<'_>> {
        self.tensor(batch, name).ok_or_else(|| self.missing(&batch.named(name)))
    }

    fn missing(&self, name: &str) -> Error {
        Error::MissingTensor {
            name: name.to_owned(),
            searched: self.place.clone(),
            remedy: "every case needs its inputs and expected outputs; make the case again".into(),
        }
    }
}

impl Batch {
    /// Full name of a tensor.
    pub fn named(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// T, `t{T}.` and the rest of a name.
fn split(name: &str) -> Option<(usize, &str, &str)> {
    let digits = name.strip_prefix('t')?;
    let (digits, rest) = digits.split_once('.')?;
    let tokens: usize = digits.parse().ok()?;
    // Not `t+1.` nor `t01.`: two names must not be one batch.
    (tokens.to_string() == digits).then(|| (tokens, &name[..digits.len() + 2], rest))
}

fn expect_shape(tensor: &Tensor<'_>, expected: &[usize]) -> Result<()> {
    if tensor.shape != expected {
        return Err(Error::invalid(
            tensor.name.to_string(),
            format!("shape {:?}", tensor.shape),
            format!("shape {expected:?}"),
            "check the case against its config.json",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn a_prefix_has_one_spelling() {
        assert_eq!(split("t64.output"), Some((64, "t64.", "output")));
        assert_eq!(split("t1.a.b"), Some((1, "t1.", "a.b")));
        for name in ["t01.output", "t+1.output", "t.output", "output", "topk_ids", "t1", "t99999999999999999999.output"]
        {
            assert_eq!(split(name), None, "{name}");
        }
    }
}
