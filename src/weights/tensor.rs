//! A named array in its stored bytes.

use std::borrow::Cow;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::numerics;

/// A named array in its stored bytes (little-endian, row-major).
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<'a> {
    /// Name in the checkpoint.
    pub name: Cow<'a, str>,
    /// Type of an element.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// All elements as f32, converted once. Accepts F32, F16 and BF16.
    ///
    /// # Errors
    /// Another dtype or a number of elements other than `len`.
    pub fn to_f32(&self, len: usize) -> Result<Vec<f32>> {
        let values: Vec<f32> = match self.dtype {
            Dtype::F32 => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => self.halves().map(numerics::decode_f16).collect(),
            Dtype::BF16 => self.halves().map(numerics::decode_bf16).collect(),
            other => return Err(self.wrong_dtype(other, "F32, BF16 or F16")),
        };
        self.expect_len(values.len(), len)?;
        Ok(values)
    }

    /// [`Tensor::to_f32`] of a bias or a scale, which has to be finite.
    ///
    /// # Errors
    /// Likewise; a value that is NaN or infinite.
    pub fn to_finite_f32(&self, len: usize) -> Result<Vec<f32>> {
        let values = self.to_f32(len)?;
        finite(&self.name, &values)?;
        Ok(values)
    }

    /// All elements as i32. Accepts I32 and I64.
    ///
    /// # Errors
    /// Another dtype, another number of elements than `len`, or a value outside of i32.
    pub fn to_i32(&self, len: usize) -> Result<Vec<i32>> {
        let values: Vec<i32> = match self.dtype {
            Dtype::I32 => self.bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::I64 => self
                .bytes
                .chunks_exact(8)
                .map(|b| {
                    let value = i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
                    i32::try_from(value).map_err(|_| {
                        Error::invalid(self.name.to_string(), value, "values that fit 32 bits", "correct the tensor")
                    })
                })
                .collect::<Result<_>>()?,
            other => return Err(self.wrong_dtype(other, "I32 or I64")),
        };
        self.expect_len(values.len(), len)?;
        Ok(values)
    }

    fn halves(&self) -> impl Iterator<Item = u16> + 'a {
        self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
    }

    pub(super) fn wrong_dtype(&self, found: Dtype, expected: &str) -> Error {
        Error::invalid(
            format!("{}.dtype", self.name),
            format!("{found:?}"),
            expected,
            "convert the tensor or correct the spec",
        )
    }

    fn expect_len(&self, found: usize, expected: usize) -> Result<()> {
        if found != expected {
            return Err(Error::invalid(
                self.name.to_string(),
                format!("{found} elements (shape {:?})", self.shape),
                format!("{expected} elements"),
                "check the tensor against config.json",
            ));
        }
        Ok(())
    }
}

/// Refuses a tensor of another shape or size.
pub(super) fn expect_shape(tensor: &Tensor<'_>, expected: &[usize], bytes: Option<usize>) -> Result<()> {
    if tensor.shape != expected || Some(tensor.bytes.len()) != bytes {
        return Err(Error::invalid(
            tensor.name.to_string(),
            format!("shape {:?} in {} bytes", tensor.shape, tensor.bytes.len()),
            format!("shape {expected:?}{}", bytes.map_or(String::new(), |bytes| format!(" in {bytes} bytes"))),
            "check the tensor against config.json",
        ));
    }
    Ok(())
}

/// A bias or a scale that is NaN or infinite spoils what it touches: the checkpoint is damaged.
pub(super) fn finite(field: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::invalid(
            field.to_owned(),
            format!("{} at {at}", values[at]),
            "finite numbers",
            "the checkpoint is damaged: download or convert it again",
        )),
    }
}
