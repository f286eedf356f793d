//! The products of `grouped_gemm` in vector instructions, where the machine has them.
//!
//! The same function as the twin's, with another order of sums: weights and entering rows become f32 with their
//! scales, and a sum is sixteen fused sums side by side over columns 16 apart, then halved four times. So it has the
//! same bits for any number of rows, tiles and threads, and on each kind of machine here. A row with NaN or an
//! infinity goes to the twin's loops, which say what becomes of it.

use std::cell::Cell;

use arrayvec::ArrayVec;

use crate::kernels::grouped_gemm::{EnteringRow, Lot, Products, Twin};
use crate::kernels::pack::{PackedBlocks, PackedMatrix};
use crate::kernels::{GroupedGemm, RowValues};
use crate::weights::{Code, PackedScale, Parts};

/// Values side by side.
pub(super) const LANES: usize = 16;
/// Packed rows of a tile, and most entering rows.
pub(super) const TILE: usize = 4;

/// Vector instructions that the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instructions {
    /// AVX-512 with tables of 128 bytes (VBMI).
    Avx512,
    /// AVX2 with fused multiplications and binary16.
    Avx2,
}

/// What a scale does to a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scaling {
    /// Nothing: there is none, or one of the whole row.
    None,
    /// `code * scale`.
    Scale,
    /// `(code - zero) * scale`.
    Zero,
    /// `code * scale - min`.
    Min,
}

/// Which scales the codes of a vector of sixteen words have: those of word l begin at
/// `vector * per_vec / vecs + lanes[l]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    pub per_vec: usize,
    pub vecs: usize,
    pub lanes: [u32; LANES],
}

/// A packed row with its scales as f32.
#[derive(Clone, Copy)]
pub(super) struct PackedRow<'a> {
    pub words: &'a [u32],
    pub scales: &'a [f32],
    /// Zeros or minima.
    pub offsets: &'a [f32],
}

/// Packed rows and how they are decoded.
pub(super) struct Packed<'a> {
    pub code: Code,
    pub scaling: Scaling,
    pub places: Places,
    pub rows: [PackedRow<'a>; TILE],
}

/// The products of one kernel.
pub(super) struct Fast<'a> {
    kernel: &'a GroupedGemm,
    layout: PackedMatrix,
    instructions: Instructions,
    scaling: Scaling,
    places: Places,
}

impl<'a> Fast<'a> {
    /// Those of `kernel`; `None` where its weights need the twin: columns in an order of their own, and blocks that
    /// vectors of codes do not divide.
    pub fn new(kernel: &'a GroupedGemm, instructions: Instructions) -> Option<Self> {
        let layout = kernel.layout();
        let Parts { code, blocks: _, row_scale: _ } = layout.parts;
        let per_word = 32 / code.bits();
        let (scaling, places) = match layout.blocks() {
            None if code.bits() == 4 => return None,
            None => (Scaling::None, Places { per_vec: 0, vecs: 1, lanes: [0; LANES] }),
            Some(blocks) => (scaling(code, blocks)?, places(blocks, per_word)?),
        };
        Some(Self { kernel, layout, instructions, scaling, places })
    }

    fn per_word(&self) -> usize {
        32 / self.layout.parts.code.bits()
    }

    /// Floats that a row's scales take: blocks, and as many as a vector reads beyond.
    fn scales(&self) -> usize {
        self.layout.blocks().map_or(0, |blocks| blocks.per_row + LANES)
    }
}

/// `None` for scales that no code here has.
fn scaling(code: Code, blocks: PackedBlocks) -> Option<Scaling> {
    let scaling = match blocks.scale {
        PackedScale::F32
        | PackedScale::F16
        | PackedScale::Bf16
        | PackedScale::E8m0
        | PackedScale::E4m3
        | PackedScale::Q6K => Scaling::Scale,
        PackedScale::F16Zero | PackedScale::Bf16Zero => Scaling::Zero,
        PackedScale::Q4K => Scaling::Min,
    };
    match code {
        Code::F32 | Code::F16 | Code::Bf16 => None,
        Code::E4m3 | Code::Int8 | Code::E2m1 | Code::Int4 => (scaling == Scaling::Scale).then_some(scaling),
        Code::Uint4 => Some(scaling),
    }
}

fn places(blocks: PackedBlocks, per_word: usize) -> Option<Places> {
    let PackedBlocks { rows: _, cols, per_row, scale: _, words: _, act_order } = blocks;
    let per_vec = LANES * per_word;
    match () {
        () if act_order => None,
        () if per_row == 1 => Some(Places { per_vec: 0, vecs: 1, lanes: [0; LANES] }),
        () if cols.is_multiple_of(per_vec) => Some(Places { per_vec: 1, vecs: cols / per_vec, lanes: [0; LANES] }),
        () if per_vec.is_multiple_of(cols) && cols.is_multiple_of(per_word) => {
            let lanes = std::array::from_fn(|lane| (lane * per_word / cols) as u32);
            Some(Places { per_vec: per_vec / cols, vecs: 1, lanes })
        }
        () => None,
    }
}

thread_local! {
    /// Scales of a tile's rows, then zeros or minima. Each thread keeps its own.
    static SCALES: Cell<Vec<f32>> = Cell::default();
}

impl Products for Fast<'_> {
    fn reserve(&self) {
        let mut scales = SCALES.take();
        scales.clear();
        // Without the room a call allocates what it needs.
        let _ = scales.try_reserve(2 * TILE * self.scales());
        SCALES.set(scales);
        // For rows that are not finite.
        Twin(self.kernel).reserve();
    }

    fn padded(&self) -> usize {
        self.kernel.cols.next_multiple_of(LANES * self.per_word())
    }

    /// Scales multiplied in, but for one of the whole row, and within each vector of words the first code's columns of
    /// all words, the second's, ...: as the words are decoded.
    fn arrange(&self, values: &mut [f32], scales: &[f32]) -> bool {
        let largest = |values: &[f32]| values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff));
        if largest(values).max(largest(scales)) >= f32::INFINITY.to_bits() {
            return false;
        }
        match self.kernel.input {
            RowValues::Floats(_) => {}
            RowValues::Codes { code: _, group, scales: _ } => {
                if let (Some(group), true) = (group, scales.len() > 1) {
                    for (values, scale) in values.chunks_mut(group).zip(scales) {
                        values.iter_mut().for_each(|value| *value *= scale);
                    }
                }
            }
        }
        match self.per_word() {
            1 => {}
            2 => transpose::<2>(values),
            4 => transpose::<4>(values),
            _ => transpose::<8>(values),
        }
        true
    }

    fn sums<'a>(
        &self,
        lot: &Lot<'_>,
        rows: usize,
        entering: &impl Fn(usize) -> EnteringRow<'a>,
        store: &mut impl FnMut(usize, &[usize], &[f32]),
    ) {
        let mut scales = SCALES.take();
        let mut waiting = (0..rows).filter_map(|at| {
            let EnteringRow { values, scales, arranged } = entering(at);
            let scale = if let [scale] = scales { *scale } else { 1.0 };
            arranged.then_some(Ready { number: at, values, scale })
        });
        loop {
            let ready: ArrayVec<_, AT_ONCE> = waiting.by_ref().take(AT_ONCE).collect();
            if ready.is_empty() {
                break;
            }
            self.tiles(lot, &ready, &mut scales, store);
        }
        SCALES.set(scales);
        for at in (0..rows).filter(|&at| !entering(at).arranged) {
            Twin(self.kernel).sums(lot, 1, &|_| entering(at), &mut |packed, _, sums| store(packed, &[at], sums));
        }
    }
}

/// Entering rows that a tile of packed rows meets while it is in the nearest cache.
const AT_ONCE: usize = 64;

/// An entering row that is arranged.
struct Ready<'a> {
    number: usize,
    values: &'a [f32],
    /// Of the whole row.
    scale: f32,
}

impl Fast<'_> {
    fn tiles(
        &self,
        lot: &Lot<'_>,
        ready: &[Ready<'_>],
        scales: &mut Vec<f32>,
        store: &mut impl FnMut(usize, &[usize], &[f32]),
    ) {
        let &Lot { segment, span, ref packed } = lot;
        let room = self.scales();
        scales.clear();
        scales.resize(2 * TILE * room, 0.0);
        let row_words = self.layout.vecs_per_row() * 4;
        let codes = 4 * span[2] as usize;
        // As many in each tile, not four and one.
        let tiles = ready.len().div_ceil(TILE);
        let together = ready.len().div_ceil(tiles);
        for first in packed.clone().step_by(TILE) {
            // A tile at the end has its last row more than once.
            let row = |at: usize| (first + at).min(packed.end - 1);
            let (scales, offsets) = scales.split_at_mut(TILE * room);
            if let Some(blocks) = self.layout.blocks() {
                for at in 0..TILE {
                    let row = blocks.scale_row(self.layout.pair, row(at), span[5] as usize);
                    let words = &segment[span[3] as usize + row * blocks.words..][..blocks.words];
                    let (scales, offsets) = (&mut scales[at * room..][..room], &mut offsets[at * room..][..room]);
                    self.instructions.scales(blocks, words, &mut scales[..blocks.per_row], offsets);
                }
            }
            let rows = std::array::from_fn(|at| PackedRow {
                words: &segment[codes + (row(at) - span[0] as usize) * row_words..][..row_words],
                scales: &scales[at * room..][..room],
                offsets: &offsets[at * room..][..room],
            });
            let tile = Packed { code: self.layout.parts.code, scaling: self.scaling, places: self.places, rows };
            let row_scales: [f32; TILE] = std::array::from_fn(|at| self.layout.row_scale(segment, span, row(at)));
            for (pass, ready) in ready.chunks(together).enumerate() {
                let x: ArrayVec<_, TILE> = ready.iter().map(|ready| ready.values).collect();
                let numbers: ArrayVec<_, TILE> = ready.iter().map(|ready| ready.number).collect();
                // Each asks memory for its part of the next rows, so that none waits for all of them.
                let ahead = TILE * pass / tiles..TILE * (pass + 1) / tiles;
                let mut sums = [[0.0; TILE]; TILE];
                self.instructions.multiply(&tile, &x, ahead, &mut sums);
                for (at, (sums, row_scale)) in sums.iter_mut().zip(row_scales).enumerate().take(packed.end - first) {
                    // Scales of whole rows act behind the sum.
                    for (sum, ready) in sums.iter_mut().zip(ready) {
                        *sum *= row_scale * ready.scale;
                    }
                    store(first + at, &numbers, sums);
                }
            }
        }
    }
}

/// Within each run of `16 * N` values, value `l * N + n` to `n * 16 + l`.
fn transpose<const N: usize>(values: &mut [f32]) {
    let mut run = [[0.0; LANES]; N];
    for values in values.chunks_exact_mut(LANES * N) {
        for (lane, word) in values.as_chunks::<N>().0.iter().enumerate().take(LANES) {
            for (run, value) in run.iter_mut().zip(word) {
                run[lane] = *value;
            }
        }
        values.copy_from_slice(run.as_flattened());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics;

    const ALL: [Instructions; 2] = [Instructions::Avx512, Instructions::Avx2];

    /// What this machine has: the best, and what is below it.
    fn instructions() -> Vec<Instructions> {
        let best = Instructions::detect().expect("AVX2");
        ALL.into_iter().skip_while(|instructions| *instructions != best).collect()
    }

    const CODES: [Code; 8] =
        [Code::F32, Code::F16, Code::Bf16, Code::E4m3, Code::E2m1, Code::Int8, Code::Int4, Code::Uint4];

    /// Codes that are not zero, one in each row of a tile, in any place of it.
    #[test]
    fn every_code_is_decoded_as_numerics_says() {
        let scales = [1.0; 4 * LANES];
        let places = Places { per_vec: 0, vecs: 1, lanes: [0; LANES] };
        for code in CODES {
            let (bits, per_word) = (code.bits(), 32 / code.bits());
            let scaling = if bits == 4 { Scaling::Scale } else { Scaling::None };
            let step = if bits == 32 { 0x1234_5678 } else { 1 };
            let all: Vec<u32> = (0..=u32::MAX >> (32 - bits)).step_by(step).collect();
            for instructions in instructions() {
                for (number, codes) in all.chunks(TILE).enumerate() {
                    let (word, place) = (number % 20, number % per_word);
                    let code_at = |at: usize| codes.get(at).copied().unwrap_or(0);
                    let mut words = [[0; 20]; TILE];
                    words.iter_mut().enumerate().for_each(|(at, words)| words[word] = code_at(at) << (bits * place));
                    // 1 for it, 0 for the others.
                    let mut x = vec![0.0; 2 * LANES * per_word];
                    x[(word / LANES * per_word + place) * LANES + word % LANES] = 1.0;
                    let rows = words.each_ref().map(|words| PackedRow { words, scales: &scales, offsets: &[] });
                    let mut sums = [[0.0; TILE]; TILE];
                    instructions.multiply(&Packed { code, scaling, places, rows }, &[&x], 0..TILE, &mut sums);
                    for (at, sums) in sums.iter().enumerate() {
                        let want = numerics::decode(code, code_at(at));
                        let same = sums[0] == want || sums[0].is_nan() && want.is_nan();
                        assert!(same, "{instructions:?}, {code:?}: {:#x} is {}, not {want}", code_at(at), sums[0]);
                    }
                }
            }
        }
    }

    #[test]
    fn every_scale_is_decoded_as_numerics_says() {
        let scales = [
            PackedScale::F32,
            PackedScale::F16,
            PackedScale::Bf16,
            PackedScale::E8m0,
            PackedScale::E4m3,
            PackedScale::F16Zero,
            PackedScale::Bf16Zero,
            PackedScale::Q4K,
            PackedScale::Q6K,
        ];
        let mut rng = fastrand::Rng::with_seed(7);
        for scale in scales {
            for per_row in [1, 5, 16, 37, 80] {
                let (rows, cols, words) = (1, 32, scale.words(per_row));
                let blocks = PackedBlocks { rows, cols, per_row, scale, words, act_order: false };
                let words: Vec<u32> = (0..words).map(|_| rng.u32(..)).collect();
                for instructions in instructions() {
                    let (mut scales, mut offsets) = (vec![0.0; per_row], vec![0.0; per_row]);
                    instructions.scales(blocks, &words, &mut scales, &mut offsets);
                    for block in 0..per_row {
                        let [scale, zero, min] = blocks.scale_of(&words, block);
                        let same = |got: f32, want: f32| got == want || !want.is_finite();
                        assert!(same(scales[block], scale) && same(offsets[block], zero + min), "{blocks:?}, {block}");
                    }
                }
            }
        }
    }

    /// A sum does not depend on the rows beside it, nor on the machine.
    #[test]
    fn sums_have_the_same_bits_for_any_instructions_and_rows() {
        let mut rng = fastrand::Rng::with_seed(8);
        for code in CODES {
            for scaling in [Scaling::None, Scaling::Scale, Scaling::Zero, Scaling::Min] {
                let words: Vec<Vec<u32>> =
                    (0..TILE).map(|_| (0..84).map(|_| rng.u32(..) & 0x3f3f_3f3f).collect()).collect();
                let [scales, offsets] = [(); 2].map(|()| (0..200).map(|_| rng.f32()).collect::<Vec<_>>());
                let per_word = 32 / code.bits();
                let padded = 96 * per_word;
                let x: Vec<Vec<f32>> = (0..TILE).map(|_| (0..padded).map(|_| rng.f32() - 0.5).collect()).collect();
                let places = Places { per_vec: 2, vecs: 1, lanes: std::array::from_fn(|lane| lane as u32 / 8) };
                let rows =
                    std::array::from_fn(|at| PackedRow { words: &words[at], scales: &scales, offsets: &offsets });
                let packed = Packed { code, scaling, places, rows };
                let x: Vec<&[f32]> = x.iter().map(|x| &x[..]).collect();
                let mut want = [[0.0; TILE]; TILE];
                Instructions::detect().unwrap().multiply(&packed, &x, 0..TILE, &mut want);
                for instructions in instructions() {
                    for count in 1..=TILE {
                        let mut sums = [[0.0; TILE]; TILE];
                        instructions.multiply(&packed, &x[TILE - count..], 0..1, &mut sums);
                        for (sums, want) in sums.iter().zip(&want) {
                            assert_eq!(sums[..count], want[TILE - count..], "{instructions:?}, {code:?}, {count}");
                        }
                    }
                }
            }
        }
    }
}
