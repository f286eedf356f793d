//! Low-rank adapters of the routed experts.

use super::WeightFormat;
use super::validate::width;
use crate::error::{Error, Result};

/// Low-rank adapters of the routed experts: a token t with adapter a(t) adds `B13[a, e] (A13[a, e] x)` to what expert
/// e's first GEMM yields, gate and up with a B each, and `B2[a, e] (A2[a, e] h)` to the second's, under the same
/// routing weight. Both act before the biases, and so before clamp and activation.
///
/// x and h are what enters the base GEMM before it is quantised, weighted by w where the base's rows are
/// ([`WeightPosition`](super::WeightPosition)). alpha / r is folded into B. Two A's for gate and up are one A of twice
/// the rank, each B filled with zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lora {
    /// Adapters loaded; ids of tokens are 0 to here, -1 for none.
    pub num_adapters: usize,
    /// r.
    pub rank: usize,
    /// Type of the matrices: without scales.
    pub format: WeightFormat,
    /// How the delta joins.
    pub delta: LoraDelta,
}

/// How a LoRA delta joins the base value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoraDelta {
    /// Added in f32.
    F32,
    /// Both rounded to the model's type, then added in it: `T(T(base) + T(delta))`, where a token without an adapter
    /// has a delta of 0.
    Model,
}

/// Most adapters times experts: their matrices are groups of one GEMM, whose indices are i32.
pub(super) const MAX_ADAPTED: usize = 1 << 20;

impl Lora {
    pub(super) fn validate(&self, num_slots: usize) -> Result<()> {
        let Self { num_adapters, rank, format, delta: LoraDelta::F32 | LoraDelta::Model } = self;
        width("lora.rank", *rank)?;
        if *num_adapters == 0 || num_adapters.checked_mul(num_slots).is_none_or(|all| all > MAX_ADAPTED) {
            return Err(Error::invalid(
                "lora.num_adapters",
                num_adapters,
                format!("1 to {} beside {num_slots} experts", MAX_ADAPTED / num_slots),
                "load fewer adapters at once",
            ));
        }
        match format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => Ok(()),
            WeightFormat::Fp8Block { block: _, scale: _ }
            | WeightFormat::Fp8Tensor
            | WeightFormat::Fp8Channel
            | WeightFormat::Int8Channel
            | WeightFormat::Mxfp4
            | WeightFormat::Nvfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
            | WeightFormat::Q8_0
            | WeightFormat::Q4K
            | WeightFormat::Q6K => Err(Error::invalid(
                "lora.format",
                format!("{format:?}"),
                "F32, F16 or Bf16",
                "adapters are small: widen them",
            )),
        }
    }
}
