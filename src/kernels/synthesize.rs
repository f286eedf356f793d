//! `synthesize`: packed weights that are a hash of their place, made where they lie. So a layer of any size has weights
//! without a checkpoint and without a copy through the host, and whoever wants one row of it makes that row alone.
//!
//! A word of a row (its codes along K, or its scales) is the same in a checkpoint and packed:
//! `(hash(tensor, group, row, word) & mask) + base`. Mask and base make legal codes of any bits: of a float they leave
//! the sign, the mantissa and three bits of the exponent, so that magnitudes spread over eight powers of two.
//! No step of a layer: benches and tests launch it. Exact.

use rayon::prelude::*;

use super::pack::{PackedMatrix, SPAN_WORDS};
use super::{Arguments, Source, Value, read, shader, write};
use crate::error::{Result, Unsupported};
use crate::weights::{Blocks, Code, PackedScale, Parts};

/// Elements of a row as words: how the bits of a hash become them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elements {
    /// Bits of an element, a power of two.
    pub bits: usize,
    /// What is kept of a hash.
    pub mask: u32,
    /// What is added.
    pub base: u32,
}

impl Elements {
    /// One a word, or several of fewer bits.
    fn repeated(bits: usize, mask: u32, base: u32) -> Self {
        let copies = (0..32 / bits).fold(0, |all, copy| all | 1 << (bits * copy));
        Self { bits, mask: mask.wrapping_mul(copies), base: base.wrapping_mul(copies) }
    }

    /// Floats whose lowest magnitudes are `2^exponent`, with `spread` bits of exponent above.
    fn floats(bits: usize, mantissa: u32, bias: i32, sign: bool, spread: u32, exponent: i32) -> Self {
        let sign = if sign { 1 << (bits - 1) } else { 0 };
        let base = (exponent + bias).max(0) as u32;
        Self::repeated(bits, sign | ((1 << (mantissa + spread)) - 1), base << mantissa)
    }

    /// Biases: f32 of both signs, 2^-9 to 1/2.
    pub const BIASES: Self = Self { bits: 32, mask: 0x83ff_ffff, base: (127 - 9) << 23 };

    /// Word `word` of row `row`, which has `count` elements: 0 behind the last. Twin: `synthetic_word` and `kept` in
    /// shaders/synthesize/words.wgsl
    pub fn word(&self, tensor: u32, group: usize, row: usize, word: usize, count: usize) -> u32 {
        let Self { bits, mask, base } = *self;
        let held = count.saturating_sub(word * (32 / bits)).min(32 / bits);
        let kept = u32::MAX.checked_shr((32 - held * bits) as u32).unwrap_or(0);
        (hash(tensor, group as u32, row as u32, word as u32) & mask).wrapping_add(base) & kept
    }
}

/// The finaliser of MurmurHash3.
fn mix(value: u32) -> u32 {
    let h = (value ^ value >> 16).wrapping_mul(0x85eb_ca6b);
    let h = (h ^ h >> 13).wrapping_mul(0xc2b2_ae35);
    h ^ h >> 16
}

/// 32 bits for a place. Twin: `hash_at` in shaders/synthesize/words.wgsl
pub fn hash(tensor: u32, group: u32, row: u32, word: u32) -> u32 {
    const STEP: u32 = 0x9e37_79b9;
    mix(mix(mix(tensor.wrapping_mul(STEP).wrapping_add(group)).wrapping_add(row)).wrapping_add(word.wrapping_mul(STEP)))
}

/// The elements of a matrix's codes and block scales, of a size that keeps that of what it multiplies.
///
/// # Errors
/// Codes or scales that are not numbers by themselves.
pub fn elements(parts: &Parts, cols: usize) -> Result<(Elements, Option<Elements>), Unsupported> {
    let refuse = |because: &'static str| Unsupported {
        backend: "synthesize".into(),
        field: "format".into(),
        value: format!("{parts:?}"),
        because: because.into(),
    };
    let Parts { code, blocks, row_scale } = *parts;
    if row_scale {
        return Err(refuse("no rows with a scale of their own are made"));
    }
    // log2 of what a weight should measure, less that of a scale's and of a code's root of the mean square.
    let wanted = -0.5 * (cols as f64).log2();
    let scale = match blocks {
        None => None,
        Some(Blocks { rows: _, cols: _, scale, act_order: false }) => Some(scale),
        Some(Blocks { rows: _, cols: _, scale: _, act_order: true }) => {
            return Err(refuse("no orders of columns are made"));
        }
    };
    // Of eight powers of two the largest is 2^7 times the first; 0.62 of that is the root of the mean square.
    let rms = |log_rms: f64| (wanted - log_rms).round() as i32;
    let alone = rms(7.0 + 0.62f64.log2());
    let (codes, code_rms) = match code {
        Code::F32 => (Elements::floats(32, 23, 127, true, 3, alone), 0.0),
        Code::F16 => (Elements::floats(16, 10, 15, true, 3, alone), 0.0),
        Code::Bf16 => (Elements::floats(16, 7, 127, true, 3, alone), 0.0),
        // Exponents 0 to 7 of 15, which has the NaN: below 2.
        Code::E4m3 => (Elements::floats(8, 3, 7, true, 3, -7), 0.6f64.log2()),
        // Each of the sixteen.
        Code::E2m1 => (Elements::repeated(4, 15, 0), 2.93f64.log2()),
        Code::Int8 | Code::Int4 | Code::Uint4 => return Err(refuse("no integer codes are made")),
    };
    let scales = match scale {
        None => None,
        // A power of two, or up to twice that.
        Some(PackedScale::F32) => Some(Elements::floats(32, 23, 127, false, 0, rms(code_rms + 0.61))),
        Some(PackedScale::F16) => Some(Elements::floats(16, 10, 15, false, 0, rms(code_rms + 0.61))),
        Some(PackedScale::Bf16) => Some(Elements::floats(16, 7, 127, false, 0, rms(code_rms + 0.61))),
        // One of two powers of two.
        Some(PackedScale::E8m0) => Some(Elements::floats(8, 0, 127, false, 1, rms(code_rms + 0.66))),
        Some(
            PackedScale::E4m3 | PackedScale::F16Zero | PackedScale::Bf16Zero | PackedScale::Q4K | PackedScale::Q6K,
        ) => return Err(refuse("no scales of scales, zeros or minima are made")),
    };
    Ok((codes, scales))
}

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Synthesize {
    /// Number of the first of `pair` matrices; each has three tensors (codes, scales, bias).
    pub first_tensor: u32,
    /// Words of a packed row.
    pub row_words: usize,
    /// K.
    pub cols: usize,
    /// 2 if gate and up rows alternate, else 1.
    pub pair: usize,
    /// Codes of a row.
    pub codes: Elements,
    /// Block scales: words of a row of them, how many they are, and what they are.
    pub scales: Option<(usize, usize, Elements)>,
    /// Whether rows have biases.
    pub bias: bool,
}

impl Synthesize {
    /// Invocations of a workgroup.
    pub const WORKGROUP: usize = 256;

    /// The kernel for the segments of `matrix`.
    ///
    /// # Errors
    /// As [`elements`].
    pub fn of(matrix: &PackedMatrix, first_tensor: u32) -> Result<Self, Unsupported> {
        let (codes, scales) = elements(&matrix.parts, matrix.cols)?;
        let blocks = matrix.blocks().map(|blocks| (blocks.words, blocks.per_row));
        Ok(Self {
            first_tensor,
            row_words: 4 * matrix.vecs_per_row(),
            cols: matrix.cols,
            pair: matrix.pair,
            codes,
            scales: blocks.zip(scales).map(|((words, count), scales)| (words, count, scales)),
            bias: matrix.bias,
        })
    }

    pub(super) fn source(&self) -> Source {
        let Self { first_tensor, row_words, cols, pair, codes, scales, bias } = self;
        let log = |elements: &Elements| Value::U32((32 / elements.bits).ilog2());
        // Without scales no word is one; a row of none would divide by 0.
        let (scale_words, blocks, scales) = scales.unwrap_or((1, 0, *codes));
        let biases = Elements::BIASES;
        let constants = vec![
            ("FIRST_TENSOR", Value::U32(*first_tensor)),
            ("PAIR", Value::U32(*pair as u32)),
            ("ROW_WORDS", Value::U32(*row_words as u32)),
            ("COLS", Value::U32(*cols as u32)),
            ("CODE_LOG", log(codes)),
            ("CODE_MASK", Value::U32(codes.mask)),
            ("CODE_BASE", Value::U32(codes.base)),
            ("SCALE_WORDS", Value::U32(scale_words as u32)),
            ("BLOCKS", Value::U32(blocks as u32)),
            ("SCALE_LOG", log(&scales)),
            ("SCALE_MASK", Value::U32(scales.mask)),
            ("SCALE_BASE", Value::U32(scales.base)),
            ("BIAS", Value::Bool(*bias)),
            ("BIAS_MASK", Value::U32(biases.mask)),
            ("BIAS_BASE", Value::U32(biases.base)),
        ];
        let bindings = vec![read("spans", "array<vec4<u32>>"), write("segment", "array<vec4<u32>>")];
        let fragments = vec![shader!("fragments/span.wgsl"), shader!("synthesize/words.wgsl")];
        Source { constants, bindings, fragments }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let spans = arguments.read("spans")?;
        let mut rest = arguments.write("segment")?;
        let (mut begin, mut runs) = (0, vec![]);
        for (group, span) in spans.chunks_exact(SPAN_WORDS).enumerate().filter(|(_, span)| span[0] < span[1]) {
            let rows = (span[1] - span[0]) as usize;
            let [first, end] = [4 * span[2] as usize, span[4] as usize + if self.bias { rows } else { 0 }];
            // Runs lie in order of their groups, each a whole number of vectors.
            let (run, behind) = std::mem::take(&mut rest).split_at_mut(end.next_multiple_of(4) - begin);
            runs.push((group, span, first, &mut run[first - begin..]));
            (begin, rest) = (end.next_multiple_of(4), behind);
        }
        const PIECE: usize = 1 << 16;
        for (group, span, first, run) in runs {
            run.par_chunks_mut(PIECE).enumerate().for_each(|(piece, words)| {
                for (at, word) in words.iter_mut().enumerate() {
                    *word = self.word(span, group, first + piece * PIECE + at);
                }
            });
        }
        Ok(())
    }

    /// Word `word` of the segment. Twin: `synthetic_word` in shaders/synthesize/words.wgsl
    fn word(&self, span: &[u32], group: usize, word: usize) -> u32 {
        let Self { first_tensor, row_words, cols, pair, codes, scales, bias } = self;
        let [row_begin, row_end, vecs, first_scale, first_bias, first_block] =
            [0, 1, 2, 3, 4, 5].map(|at| span[at] as usize);
        let tensor = |row: usize, part: u32| first_tensor + 3 * (row % pair) as u32 + part;
        match scales {
            _ if word < first_scale => {
                let at = word - 4 * vecs;
                let row = row_begin + at / row_words;
                codes.word(tensor(row, 0), group, row / pair, at % row_words, *cols)
            }
            Some((scale_words, count, scales)) if word < first_bias => {
                let (row, at) = ((word - first_scale) / scale_words, (word - first_scale) % scale_words);
                scales.word(tensor(row, 1), group, first_block + row / pair, at, *count)
            }
            Some(_) | None => {
                let row = row_begin + word - first_bias;
                if !bias || row >= row_end {
                    return 0;
                }
                Elements::BIASES.word(tensor(row, 2), group, row / pair, 0, 1)
            }
        }
    }
}
