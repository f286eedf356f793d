//! `diagnose`: counts that explain accuracy, from buffers that other steps have left. Planned only on demand
//! ([`Options::diagnostics`](crate::schedule::Options::diagnostics)), but for experts that can miss; changes no
//! result. Exact.

use super::{
    Arguments, Fragment, PARAMS, Source, Value, input_fragments, read, read_write, round_fragments, shader, unique,
};
use crate::error::Result;
use crate::kernels::quantize::Matrices;
use crate::numerics;
use crate::spec::{Activation, ActivationCode, FloatType, Rounding};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Counted {
    /// Values of gate that the activation's limit changes, in rows of gate and up as [`super::ValueSource`] has them.
    ClampedGate {
        /// With a limit.
        activation: Activation,
        /// Rounding before it.
        gate_up: Rounding,
    },
    /// Values of up that it changes.
    ClampedUp {
        /// With a limit.
        activation: Activation,
        /// Rounding before it.
        gate_up: Rounding,
    },
    /// Codes at either end of their range.
    SaturatedCodes(ActivationCode),
    /// f32 values that are NaN or infinite.
    NonFinite,
    /// Values of this type that are infinite.
    Infinite(FloatType),
    /// Rows of each expert: as many counters as there are experts.
    Load(usize),
    /// Rows of each expert that should be here and is not, likewise; planned wherever experts can miss.
    Misses(usize),
}

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagnose {
    /// What is counted.
    pub counted: Counted,
    /// Rows that a token has.
    pub rows_per_token: usize,
    /// Values of a row; of gate and up as many as features.
    pub cols: usize,
    /// Rows without a matrix do not count.
    pub matrices: Matrices,
    /// The counter, or the first of them.
    pub slot: usize,
    /// T, where anything is rounded.
    pub model: FloatType,
}

/// The limits of gate and up, and whether gate's acts behind silu.
fn limits(activation: Activation) -> Option<(f32, bool)> {
    match activation {
        Activation::Swiglu { limit } | Activation::SwigluOai { alpha: _, limit, beta: _ } => {
            limit.map(|limit| (limit, false))
        }
        Activation::SwigluClampAfter { limit } => Some((limit, true)),
        Activation::Situ { beta: _, linear_beta: _ }
        | Activation::GeluTanh
        | Activation::GeluErf
        | Activation::Relu2 => None,
    }
}

/// Whether an activation has a limit whose effect can be counted.
pub fn clamps(activation: Activation) -> bool {
    limits(activation).is_some()
}

impl Diagnose {
    pub(super) fn source(&self) -> Source {
        let Self { counted, rows_per_token, cols, matrices, slot, model } = self;
        let mut constants =
            vec![("ROWS_PER_TOKEN", Value::U32(*rows_per_token as u32)), ("SLOT", Value::U32(*slot as u32))];
        let mut bindings = vec![PARAMS];
        let mut fragments = vec![shader!("fragments/params.wgsl")];
        if let Counted::Load(num_experts) = counted {
            constants.push(("NUM_EXPERTS", Value::U32(*num_experts as u32)));
            bindings.extend([read("topk_ids", "array<i32>"), read_write("counters", "array<u32>")]);
            fragments.push(shader!("diagnose/load.wgsl"));
            return Source { constants, bindings, fragments };
        }
        if let Counted::Misses(num_experts) = counted {
            constants = vec![
                ("ROWS_PER_TOKEN", Value::U32(*rows_per_token as u32)),
                ("NUM_EXPERTS", Value::U32(*num_experts as u32)),
            ];
            bindings.extend([read("topk_ids", "array<i32>"), read("row_slots", "array<i32>")]);
            bindings.push(read_write("counters", "array<u32>"));
            fragments.push(shader!("diagnose/misses.wgsl"));
            return Source { constants, bindings, fragments };
        }
        constants.push(("COLS", Value::U32(*cols as u32)));
        bindings.extend([read("rows", "array<u32>"), read_write("counters", "array<u32>")]);
        fragments.push(match matrices {
            Matrices::Groups => shader!("fragments/counts_all.wgsl"),
            Matrices::Slots(num_slots) => {
                constants.push(("NUM_SLOTS", Value::U32(*num_slots as u32)));
                bindings.push(read("row_slots", "array<i32>"));
                shader!("fragments/counts_routed.wgsl")
            }
        });
        let mut clamped = |fragments: &mut Vec<Fragment>, activation: Activation, gate_up: Rounding| {
            let (limit, after) = limits(activation).unwrap_or((f32::MAX, false));
            constants.push(("SWIGLU_LIMIT", Value::F32(limit)));
            constants.push(("ROUND_GATE_UP", Value::Bool(gate_up == Rounding::Model)));
            fragments.extend(input_fragments(FloatType::F32));
            fragments.extend(round_fragments(*model));
            after
        };
        match *counted {
            Counted::ClampedGate { activation, gate_up } => {
                let after = clamped(&mut fragments, activation, gate_up);
                fragments.push(match after {
                    false => shader!("fragments/counted_gate.wgsl"),
                    true => shader!("fragments/counted_gate_after.wgsl"),
                });
            }
            Counted::ClampedUp { activation, gate_up } => {
                clamped(&mut fragments, activation, gate_up);
                fragments.push(shader!("fragments/counted_up.wgsl"));
            }
            Counted::SaturatedCodes(code) => fragments.push(match code {
                ActivationCode::E4m3 => shader!("fragments/counted_e4m3.wgsl"),
                ActivationCode::Int8 => shader!("fragments/counted_int8.wgsl"),
            }),
            Counted::NonFinite => fragments.push(shader!("fragments/counted_non_finite.wgsl")),
            Counted::Infinite(FloatType::F32) => fragments.push(shader!("fragments/counted_infinite_f32.wgsl")),
            Counted::Infinite(FloatType::F16) => fragments.push(shader!("fragments/counted_infinite_f16.wgsl")),
            Counted::Infinite(FloatType::Bf16) => fragments.push(shader!("fragments/counted_infinite_bf16.wgsl")),
            Counted::Load(_) | Counted::Misses(_) => {}
        }
        fragments.push(shader!("diagnose/count.wgsl"));
        Source { constants, bindings, fragments: unique(fragments) }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.rows_per_token;
        let first = arguments.first_token()? == 0;
        let add = |counters: &mut [u32], slot: usize, count: u32| {
            counters[slot] = count + if first { 0 } else { counters[slot] };
        };
        if let Counted::Load(num_experts) = self.counted {
            let ids = &arguments.read_i32("topk_ids")?[..rows];
            let counters = arguments.write("counters")?;
            if first {
                counters[..self.slot].fill(0);
            }
            for expert in 0..num_experts {
                let count = ids.iter().filter(|&&id| usize::try_from(id) == Ok(expert)).count();
                add(counters, self.slot + expert, count as u32);
            }
            return Ok(());
        }
        if let Counted::Misses(num_experts) = self.counted {
            let ids = &arguments.read_i32("topk_ids")?[..rows];
            let slots = arguments.read_i32("row_slots")?;
            let counters = arguments.write("counters")?;
            for expert in 0..num_experts {
                let missed = |(id, slot): &(&i32, &i32)| usize::try_from(**id) == Ok(expert) && **slot == -2;
                add(counters, expert, ids.iter().zip(slots).filter(missed).count() as u32);
            }
            return Ok(());
        }
        let words = arguments.read("rows")?;
        let slots = match self.matrices {
            Matrices::Groups => None,
            Matrices::Slots(num_slots) => Some((arguments.read_i32("row_slots")?, num_slots)),
        };
        let counts = |row: &usize| {
            slots.is_none_or(|(slots, count)| usize::try_from(slots[*row]).is_ok_and(|slot| slot < count))
        };
        let all = (0..rows).filter(counts).flat_map(|row| (0..self.cols).map(move |col| (row, col)));
        let count = all.filter(|&(row, col)| self.is_counted(words, row, col)).count();
        add(arguments.write("counters")?, self.slot, count as u32);
        Ok(())
    }

    /// Twin: shaders/fragments/counted_*.wgsl
    fn is_counted(&self, words: &[u32], row: usize, col: usize) -> bool {
        let at = row * self.cols + col;
        let float = |at: usize, gate_up: Rounding| {
            let value = f32::from_bits(words[at]);
            if gate_up == Rounding::Model { numerics::round_to(self.model, value) } else { value }
        };
        match self.counted {
            Counted::ClampedGate { activation, gate_up } => {
                let (limit, after) = limits(activation).unwrap_or((f32::MAX, false));
                let gate = float(2 * at, gate_up);
                (if after { gate / (1.0 + (-gate).exp()) } else { gate }) > limit
            }
            Counted::ClampedUp { activation, gate_up } => {
                let (limit, _) = limits(activation).unwrap_or((f32::MAX, false));
                float(2 * at + 1, gate_up).abs() > limit
            }
            Counted::SaturatedCodes(code) => {
                let byte = (words[row * self.cols.div_ceil(4) + col / 4] >> (8 * (col % 4))) as u8;
                match code {
                    ActivationCode::E4m3 => byte & 0x7f == 0x7e,
                    ActivationCode::Int8 => byte == 127 || byte == 128,
                }
            }
            Counted::NonFinite => words[at] & 0x7f80_0000 == 0x7f80_0000,
            Counted::Infinite(float_type) => super::decode_value(words, float_type, at).is_infinite(),
            Counted::Load(_) | Counted::Misses(_) => false,
        }
    }
}
