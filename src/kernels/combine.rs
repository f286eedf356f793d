//! `combine`: the weighted sum over slots, the routed scale on it if the spec says so, the shared expert.
//!
//! `out[t] = scale * sum over slots of topk_weights * expert_out (+ shared_out)`, in slot order, f32,
//! rounded once to the output type. Bounded by the contraction of products and sums only.

use rayon::prelude::*;

use super::{Arguments, PARAMS, Source, Value, read, shader, write};
use crate::error::Result;
use crate::spec::FloatType;

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Combine {
    /// H.
    pub hidden_size: usize,
    /// E.
    pub num_experts: usize,
    /// k.
    pub top_k: usize,
    /// rho if it acts on the output, else 1.
    pub output_scale: f32,
    /// Whether there is a shared expert.
    pub shared: bool,
    /// Type of the output.
    pub output: FloatType,
}

impl Combine {
    pub(super) fn source(&self) -> Source {
        let Self { hidden_size, num_experts, top_k, output_scale, shared, output } = self;
        let mut bindings = vec![
            PARAMS,
            read("topk_ids", "array<i32>"),
            read("topk_weights", "array<f32>"),
            read("expert_out", "array<f32>"),
            write("out", "array<u32>"),
        ];
        if *shared {
            bindings.push(read("shared_out", "array<f32>"));
        }
        Source {
            constants: vec![
                ("HIDDEN_SIZE", Value::U32(*hidden_size as u32)),
                ("NUM_EXPERTS", Value::U32(*num_experts as u32)),
                ("TOP_K", Value::U32(*top_k as u32)),
                ("ROUTED_SCALING_FACTOR", Value::F32(*output_scale)),
            ],
            bindings,
            fragments: vec![
                shader!("fragments/params.wgsl"),
                if *shared { shader!("fragments/shared_sum.wgsl") } else { shader!("fragments/shared_none.wgsl") },
                match output {
                    FloatType::F32 => shader!("fragments/store_f32.wgsl"),
                    FloatType::F16 => shader!("fragments/store_f16.wgsl"),
                    FloatType::Bf16 => shader!("fragments/store_bf16.wgsl"),
                },
                shader!("combine/slots.wgsl"),
            ],
        }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let values = arguments.tokens()? * self.hidden_size;
        let ids = arguments.read_i32("topk_ids")?;
        let weights = arguments.read_f32("topk_weights")?;
        let expert_out = arguments.read_f32("expert_out")?;
        let shared_out = if self.shared { Some(arguments.read_f32("shared_out")?) } else { None };
        let expert = |slot: usize| usize::try_from(ids[slot]).ok().filter(|&id| id < self.num_experts);
        let value = |at: usize| {
            let slots = at / self.hidden_size * self.top_k..(at / self.hidden_size + 1) * self.top_k;
            if slots.clone().any(|slot| ids[slot] != -1 && expert(slot).is_none()) {
                return f32::NAN;
            }
            let sum: f32 = slots
                .filter(|&slot| expert(slot).is_some())
                .map(|slot| weights[slot] * expert_out[slot * self.hidden_size + at % self.hidden_size])
                .sum();
            self.output_scale * sum + shared_out.map_or(0.0, |shared| shared[at])
        };
        let per_word = 4 / self.output.bytes();
        let out = &mut arguments.write("out")?[..values.div_ceil(per_word)];
        out.par_iter_mut().enumerate().for_each(|(word, out)| {
            *out = (0..per_word)
                .filter(|i| word * per_word + i < values)
                .map(|i| encode(self.output, value(word * per_word + i)) << (16 * i))
                .fold(0, |word, bits| word | bits);
        });
        Ok(())
    }
}

/// Bits of `value` rounded to nearest even. Twin: shaders/fragments/store_*.wgsl
fn encode(output: FloatType, value: f32) -> u32 {
    match output {
        FloatType::F32 => value.to_bits(),
        FloatType::F16 => u32::from(half::f16::from_f32(value).to_bits()),
        FloatType::Bf16 => u32::from(half::bf16::from_f32(value).to_bits()),
    }
}
