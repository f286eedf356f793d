//! `quantize`: rows to codes and scales, alone or behind the activation.
//!
//! Codes u32 [rows, ceil(cols / 4)], four to a word, zeros behind a row's end; scales as [`ScaleLayout`] says, or
//! one f32 a row. Exact: codes and scales are those of `numerics`, bit for bit, of the values that enter.

use rayon::prelude::*;

use super::grouped_gemm::Activated;
use super::{
    Arguments, PARAMS, Source, Value, cuda_blocks, decode_value, input_fragments, read, round_fragments, shader,
    unique, write,
};
use crate::error::Result;
use crate::numerics::{self, SpanScale};
use crate::spec::{ActivationCode, ActivationScale, FloatType, Rounding, ScaleRule};

/// Maxima that [`Amax`] leaves, one a workgroup.
pub const AMAX_PARTS: usize = 64;
/// Warps of a block, where each takes a span.
pub const QUANTIZE_WARPS: usize = 8;
/// Invocations of a workgroup for a span.
const MAX_WORKGROUP: usize = 256;

/// How the scales of groups lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleLayout {
    /// f32 [rows, groups].
    RowMajor,
    /// f32 [groups, stride], a column of rows behind the other.
    ColumnMajor {
        /// Rows from one column to the next, a multiple of 4.
        stride: usize,
    },
    /// Exponent bytes [rows, groups], four to a word, each row padded to whole words.
    Packed,
}

impl ScaleLayout {
    /// Words of the scales of `rows` rows.
    pub fn words(self, rows: usize, groups: usize) -> usize {
        match self {
            Self::RowMajor => rows * groups,
            Self::ColumnMajor { stride } => stride * groups,
            Self::Packed => rows * groups.div_ceil(4),
        }
    }

    /// One scale. Twin: shaders/fragments/input_scale_*.wgsl
    pub fn read(self, words: &[u32], row: usize, group: usize, groups: usize) -> f32 {
        match self {
            Self::RowMajor => f32::from_bits(words[row * groups + group]),
            Self::ColumnMajor { stride } => f32::from_bits(words[group * stride + row]),
            Self::Packed => {
                let word = words[row * groups.div_ceil(4) + group / 4];
                numerics::decode_e8m0((word >> (8 * (group % 4))) as u8)
            }
        }
    }

    /// Twin: shaders/fragments/store_scale_*.wgsl
    fn write(self, words: &mut [u32], row: usize, group: usize, groups: usize, scale: f32) {
        match self {
            Self::RowMajor => words[row * groups + group] = scale.to_bits(),
            Self::ColumnMajor { stride } => words[group * stride + row] = scale.to_bits(),
            Self::Packed => {
                let word = &mut words[row * groups.div_ceil(4) + group / 4];
                let byte = u32::from(numerics::ceil_e8m0(scale)) << (8 * (group % 4));
                *word = if group.is_multiple_of(4) { byte } else { *word | byte };
            }
        }
    }
}

/// Where the values come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ValueSource {
    /// Rows as they are.
    Rows {
        /// Type of a value.
        input: FloatType,
        /// Rows of codes that one entering row becomes.
        divisor: usize,
        /// Whether routing weights multiply the rows, and how the product is rounded.
        weigh: Option<Rounding>,
    },
    /// Gate and up, which alternate in f32 rows of `2 * cols` values; without gate rows of `cols`.
    Activated(Activated),
}

/// What a scale belongs to, and what it follows from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RowScale {
    /// So many columns of a row; `None` for all.
    Span {
        /// Columns, a multiple of 4.
        group: Option<usize>,
        /// From the largest magnitude to the scale.
        rule: ScaleRule,
        /// Type of the scale.
        scale: ActivationScale,
        /// Where the scales go.
        layout: ScaleLayout,
    },
    /// All rows, by the maxima that [`Amax`] has found.
    Tensor {
        /// From the largest magnitude to the scale.
        rule: ScaleRule,
        /// Type of the scale.
        scale: ActivationScale,
    },
    /// The checkpoint's, one an expert (or a shared MLP).
    Fixed(Matrices),
}

/// Which matrix a row will meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matrices {
    /// That of its group: a row is token * groups + group.
    Groups,
    /// That of `row_slots[row]`, which is one of so many.
    Slots(usize),
}

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantize {
    /// Where the values come from.
    pub source: ValueSource,
    /// Rows of codes that a token has.
    pub rows_per_token: usize,
    /// Columns.
    pub cols: usize,
    /// Type of a code.
    pub code: ActivationCode,
    /// Its scale.
    pub scale: RowScale,
    /// T, where anything is rounded.
    pub model: FloatType,
    /// Whether a warp takes a span: CUDA.
    pub warps: bool,
}

/// The largest magnitudes of all rows, for a scale of the whole tensor: u32 `[AMAX_PARTS]`, bits of f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Amax {
    /// Where the values come from.
    pub source: ValueSource,
    /// Rows that a token has.
    pub rows_per_token: usize,
    /// Columns.
    pub cols: usize,
    /// Rows without a matrix do not count.
    pub matrices: Matrices,
    /// T, where anything is rounded.
    pub model: FloatType,
}

impl ValueSource {
    /// The fragment `source_value`, with what it needs.
    pub(super) fn source(self, rows_per_token: usize, cols: usize, model: FloatType) -> Source {
        let mut constants =
            vec![("ROWS_PER_TOKEN", Value::U32(rows_per_token as u32)), ("COLS", Value::U32(cols as u32))];
        let mut bindings = vec![PARAMS, read("rows", "array<u32>")];
        let mut fragments = vec![shader!("fragments/params.wgsl")];
        let weighted = match self {
            Self::Rows { input, divisor, weigh } => {
                constants.push(("INPUT_DIVISOR", Value::U32(divisor as u32)));
                fragments.extend(input_fragments(input));
                match weigh {
                    None => fragments.push(shader!("fragments/input_unweighted.wgsl")),
                    Some(rounding) => {
                        constants.push(("ROUND_INPUT", Value::Bool(rounding == Rounding::Model)));
                        fragments.extend(round_fragments(model));
                        fragments.push(shader!("fragments/input_weighted.wgsl"));
                    }
                }
                fragments.push(shader!("fragments/source_rows.wgsl"));
                weigh.is_some()
            }
            Self::Activated(activated) => {
                let pair = if activated.activation.gated() { 2 } else { 1 };
                constants.push(("FEATURE_ROWS", Value::U32(pair)));
                fragments.extend(input_fragments(FloatType::F32));
                fragments.extend(round_fragments(model));
                fragments.extend(activated.fragments(&mut constants));
                fragments.push(shader!("fragments/source_activated.wgsl"));
                activated.weighted
            }
        };
        if weighted {
            bindings.push(read("topk_weights", "array<f32>"));
        }
        Source { constants, bindings, fragments }
    }

    /// Its twin: the value at a row and column.
    pub(super) fn value(
        self,
        words: &[u32],
        weights: Option<&[f32]>,
        [row, col]: [usize; 2],
        cols: usize,
        model: FloatType,
    ) -> f32 {
        match self {
            Self::Rows { input, divisor, weigh } => {
                let value = decode_value(words, input, row / divisor * cols + col);
                match (weigh, weights) {
                    (Some(rounding), Some(weights)) => match rounding {
                        Rounding::F32 => value * weights[row],
                        Rounding::Model => numerics::round_to(model, value * weights[row]),
                    },
                    (_, _) => value,
                }
            }
            Self::Activated(activated) => {
                let pair = if activated.activation.gated() { 2 } else { 1 };
                let at = (row * cols + col) * pair;
                let sums = [at, at + pair - 1].map(|at| f32::from_bits(words[at]));
                activated.apply(model, sums, weights.map(|weights| weights[row]))
            }
        }
    }

    pub(super) fn weights<'a>(self, arguments: &Arguments<'a>) -> Result<Option<&'a [f32]>> {
        let weighted = match self {
            Self::Rows { input: _, divisor: _, weigh } => weigh.is_some(),
            Self::Activated(activated) => activated.weighted,
        };
        weighted.then(|| arguments.read_f32("topk_weights")).transpose()
    }
}

impl Quantize {
    fn code_words(&self) -> usize {
        self.cols.div_ceil(4)
    }

    /// Whether a warp can take a span: scales in words of their own.
    pub fn fits_warps(&self) -> bool {
        match self.scale {
            RowScale::Span { group: _, rule: _, scale: _, layout } => layout != ScaleLayout::Packed,
            RowScale::Tensor { rule: _, scale: _ } | RowScale::Fixed(_) => false,
        }
    }

    /// Spans of a row, and how many a workgroup takes.
    pub fn spans(&self) -> [usize; 2] {
        match self.scale {
            RowScale::Span { group, rule: _, scale: _, layout } => {
                let spans = self.cols.div_ceil(group.unwrap_or(self.cols));
                // Who stores a word of packed scales has to know all four.
                [spans, if layout == ScaleLayout::Packed { 4 } else { 1 }]
            }
            RowScale::Tensor { rule: _, scale: _ } | RowScale::Fixed(_) => [1, 1],
        }
    }

    pub(super) fn source(&self) -> Source {
        let Source { mut constants, mut bindings, mut fragments } =
            self.source.source(self.rows_per_token, self.cols, self.model);
        constants.push(("CODE_WORDS", Value::U32(self.code_words() as u32)));
        bindings.extend([write("codes", "array<u32>"), write("scales", "array<u32>")]);
        fragments.push(shader!("fragments/exact_float.wgsl"));
        fragments.push(match self.code {
            ActivationCode::E4m3 => shader!("fragments/encode_e4m3.wgsl"),
            ActivationCode::Int8 => shader!("fragments/encode_int8.wgsl"),
        });
        match self.scale {
            RowScale::Span { group, rule, scale, layout } => {
                rule_fragments(self.code, rule, scale, &mut constants, &mut fragments);
                let [spans, per_workgroup] = self.spans();
                let span_words = group.unwrap_or(self.cols).div_ceil(4);
                constants.push(("SPANS", Value::U32(spans as u32)));
                constants.push(("SPAN_WORDS", Value::U32(span_words as u32)));
                if self.warps {
                    constants.extend(cuda_blocks(32 * QUANTIZE_WARPS as u32));
                } else {
                    let workgroup = span_words.next_power_of_two().clamp(16, MAX_WORKGROUP);
                    constants.push(("SPANS_PER_WORKGROUP", Value::U32(per_workgroup as u32)));
                    constants.push(("WORKGROUP_SIZE", Value::U32(workgroup as u32)));
                }
                fragments.push(match layout {
                    ScaleLayout::RowMajor => shader!("fragments/store_scale_row_major.wgsl"),
                    ScaleLayout::ColumnMajor { stride } => {
                        constants.push(("SCALE_STRIDE", Value::U32(stride as u32)));
                        shader!("fragments/store_scale_column_major.wgsl")
                    }
                    ScaleLayout::Packed => shader!("fragments/store_scale_packed.wgsl"),
                });
                fragments.extend(match self.warps {
                    true => vec![shader!("quantize/spans.cu")],
                    false => vec![shader!("fragments/code_word.wgsl"), shader!("quantize/spans.wgsl")],
                });
            }
            RowScale::Tensor { rule, scale } => {
                rule_fragments(self.code, rule, scale, &mut constants, &mut fragments);
                constants.push(("AMAX_PARTS", Value::U32(AMAX_PARTS as u32)));
                bindings.push(read("partial_amax", "array<u32>"));
                fragments.extend([shader!("fragments/code_word.wgsl"), shader!("quantize/tensor.wgsl")]);
            }
            RowScale::Fixed(matrices) => {
                bindings.push(read("fixed_scales", "array<u32>"));
                fragments.push(shader!("fragments/quotient_divide.wgsl"));
                fragments.push(match matrices {
                    Matrices::Groups => shader!("fragments/fixed_scale_group.wgsl"),
                    Matrices::Slots(num_slots) => {
                        constants.push(("NUM_SLOTS", Value::U32(num_slots as u32)));
                        bindings.push(read("row_slots", "array<i32>"));
                        shader!("fragments/fixed_scale_routed.wgsl")
                    }
                });
                fragments.extend([shader!("fragments/code_word.wgsl"), shader!("quantize/fixed.wgsl")]);
            }
        }
        Source { constants, bindings, fragments: unique(fragments) }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.rows_per_token;
        let (words, weights) = (arguments.read("rows")?, self.source.weights(arguments)?);
        let tensor = match self.scale {
            RowScale::Tensor { rule, scale } => {
                let parts: &[f32] = bytemuck::cast_slice(&arguments.read("partial_amax")?[..AMAX_PARTS]);
                Some(SpanScale::dynamic(self.code, rule, scale, numerics::largest_magnitude(parts)))
            }
            RowScale::Span { group: _, rule: _, scale: _, layout: _ } | RowScale::Fixed(_) => None,
        };
        let fixed = match self.scale {
            RowScale::Fixed(matrices) => {
                let slots = match matrices {
                    Matrices::Groups => None,
                    Matrices::Slots(_) => Some(arguments.read_i32("row_slots")?),
                };
                Some((arguments.read_f32("fixed_scales")?, slots))
            }
            RowScale::Span { group: _, rule: _, scale: _, layout: _ } | RowScale::Tensor { rule: _, scale: _ } => None,
        };
        let (width, layout) = match self.scale {
            RowScale::Span { group, rule: _, scale: _, layout } => (group.unwrap_or(self.cols), layout),
            RowScale::Tensor { rule: _, scale: _ } | RowScale::Fixed(_) => (self.cols, ScaleLayout::RowMajor),
        };
        let [spans, _] = self.spans();
        // Values are computed where they are needed, twice: keeping them would take memory that a call has not.
        let value = |row: usize, col: usize| self.source.value(words, weights, [row, col], self.cols, self.model);
        let columns = |span: usize| span * width..((span + 1) * width).min(self.cols);
        let scale_of = |row: usize, span: usize| match (self.scale, tensor, fixed) {
            (RowScale::Span { group: _, rule, scale, layout: _ }, _, _) => {
                let amax = numerics::largest_magnitude(columns(span).map(|col| value(row, col)));
                SpanScale::dynamic(self.code, rule, scale, amax)
            }
            (_, Some(tensor), _) => tensor,
            (_, None, Some((table, None))) => SpanScale::fixed(table[row % self.rows_per_token]),
            (_, None, Some((table, Some(slots)))) => {
                let scale = usize::try_from(slots[row]).ok().and_then(|slot| table.get(slot));
                SpanScale::fixed(scale.copied().unwrap_or(1.0))
            }
            (_, None, None) => SpanScale::fixed(f32::NAN),
        };
        let encode = |row: usize, codes: &mut [u32], keep: &mut dyn FnMut(usize, f32)| {
            codes.fill(0);
            for span in 0..spans {
                let scale = scale_of(row, span);
                keep(span, scale.scale);
                for col in columns(span) {
                    codes[col / 4] |= u32::from(scale.encode(self.code, value(row, col))) << (8 * (col % 4));
                }
            }
        };
        let codes = &mut arguments.write("codes")?[..rows * self.code_words()];
        let codes = codes.par_chunks_exact_mut(self.code_words()).enumerate();
        let scales = arguments.write("scales")?;
        let row_words = match layout {
            ScaleLayout::RowMajor => spans,
            ScaleLayout::Packed => spans.div_ceil(4),
            ScaleLayout::ColumnMajor { stride } => {
                codes.for_each(|(row, codes)| encode(row, codes, &mut |_, _| {}));
                let scales = scales[..spans * stride].par_chunks_exact_mut(stride).enumerate();
                scales.for_each(|(span, column)| {
                    let rows = column.iter_mut().take(rows).enumerate();
                    rows.for_each(|(row, scale)| *scale = scale_of(row, span).scale.to_bits());
                });
                return Ok(());
            }
        };
        let scales = scales[..rows * row_words].par_chunks_exact_mut(row_words);
        codes.zip(scales).for_each(|((row, codes), scales)| {
            encode(row, codes, &mut |span, scale| layout.write(scales, 0, span, spans, scale));
        });
        Ok(())
    }
}

/// The fragments `raw_scale`, `final_scale`, `span_factor` and `quotient`.
fn rule_fragments(
    code: ActivationCode,
    rule: ScaleRule,
    scale: ActivationScale,
    constants: &mut Vec<(&'static str, Value)>,
    fragments: &mut Vec<super::Fragment>,
) {
    let mut bits = |name: &'static str, value: f32| constants.push((name, Value::U32(value.to_bits())));
    let powers_of_two = match scale {
        ActivationScale::F32 => false,
        ActivationScale::F32CeilPow2 | ActivationScale::Ue8m0Packed => true,
    };
    let (raw, quotient) = match rule {
        ScaleRule::FlooredAmax => {
            bits("AMAX_FLOOR_BITS", 1e-10);
            bits("CODE_MAX_BITS", code.max());
            (shader!("fragments/rule_floored_amax.wgsl"), shader!("fragments/quotient_divide.wgsl"))
        }
        ScaleRule::FlooredAmaxTimesReciprocal => {
            bits("AMAX_FLOOR_BITS", 1e-10);
            bits("CODE_MAX_RECIPROCAL_BITS", 1.0 / code.max());
            let raw = shader!("fragments/rule_floored_amax_times_reciprocal.wgsl");
            (raw, shader!("fragments/quotient_divide.wgsl"))
        }
        ScaleRule::FlooredScale { upper } => {
            bits("CODE_MAX_BITS", code.max());
            bits("SCALE_FLOOR_BITS", numerics::scale_floor(code));
            let raw = match upper {
                None => shader!("fragments/rule_floored_scale.wgsl"),
                Some(upper) => {
                    bits("SCALE_UPPER_BITS", upper);
                    shader!("fragments/rule_bounded_scale.wgsl")
                }
            };
            (raw, shader!("fragments/quotient_divide.wgsl"))
        }
        ScaleRule::ReciprocalScale => {
            bits("AMAX_FLOOR_BITS", 1e-4);
            bits("CODE_MAX_BITS", code.max());
            // Dividing by a power of two is multiplying with its reciprocal, which could be no normal number.
            let quotient = match powers_of_two {
                true => shader!("fragments/quotient_divide.wgsl"),
                false => shader!("fragments/quotient_reciprocal_scale.wgsl"),
            };
            (shader!("fragments/rule_floored_amax.wgsl"), quotient)
        }
        ScaleRule::ReciprocalAmax => {
            bits("AMAX_FLOOR_BITS", 1e-4);
            bits("CODE_MAX_BITS", code.max());
            (shader!("fragments/rule_floored_amax.wgsl"), shader!("fragments/quotient_reciprocal_amax.wgsl"))
        }
    };
    let last = match powers_of_two {
        true => shader!("fragments/scale_ceil_pow2.wgsl"),
        false => shader!("fragments/scale_as_is.wgsl"),
    };
    fragments.extend([raw, last, quotient]);
}

impl Amax {
    pub(super) fn source(&self) -> Source {
        let Source { mut constants, mut bindings, mut fragments } =
            self.source.source(self.rows_per_token, self.cols, self.model);
        bindings.push(write("partial_amax", "array<u32>"));
        fragments.push(match self.matrices {
            Matrices::Groups => shader!("fragments/counts_all.wgsl"),
            Matrices::Slots(num_slots) => {
                constants.push(("NUM_SLOTS", Value::U32(num_slots as u32)));
                bindings.push(read("row_slots", "array<i32>"));
                shader!("fragments/counts_routed.wgsl")
            }
        });
        fragments.push(shader!("quantize/amax.wgsl"));
        Source { constants, bindings, fragments: unique(fragments) }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.rows_per_token;
        let (words, weights) = (arguments.read("rows")?, self.source.weights(arguments)?);
        let slots = match self.matrices {
            Matrices::Groups => None,
            Matrices::Slots(num_slots) => Some((arguments.read_i32("row_slots")?, num_slots)),
        };
        let counts =
            |row: usize| slots.is_none_or(|(slots, count)| usize::try_from(slots[row]).is_ok_and(|slot| slot < count));
        let part = |part: usize| {
            let rows = (part..rows).step_by(AMAX_PARTS).filter(|&row| counts(row));
            let largest = rows.map(|row| {
                let value = |col| self.source.value(words, weights, [row, col], self.cols, self.model);
                (0..self.cols).map(|col| value(col).to_bits() & 0x7fff_ffff).max().unwrap_or(0)
            });
            largest.max().unwrap_or(0)
        };
        let parts = &mut arguments.write("partial_amax")?[..AMAX_PARTS];
        parts.par_iter_mut().enumerate().for_each(|(at, largest)| *largest = part(at));
        Ok(())
    }
}
