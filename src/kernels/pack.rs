//! `pack`: checkpoint matrices to the layout that the GEMM kernels read. Changes no value.
//!
//! The rows of a group (an expert) stand one behind the other, each padded with zero codes to whole
//! vectors of 16 bytes. Gate and up rows alternate (gate of feature 0, up of feature 0, ...), so that
//! a tile holds both. Groups fill *segments*, buffers no larger than a binding may be; a group that
//! does not fit the rest of a segment is split between two rows. Each run of rows in a segment is a
//! [`Span`]: its codes, then what the format has of block scales ([`PackedScale`]), of row scales (f32) and of
//! column orders (a word for each column of each matrix), then its bias (f32).

use crate::error::{Error, Result, Unsupported};
use crate::numerics;
use crate::weights::{Blocks, Matrix, PackedScale, Parts};

/// Words of a packed vector.
const VEC_WORDS: usize = 4;
/// Words of a row of the span table. Twin: shaders/fragments/span.wgsl
pub const SPAN_WORDS: usize = 8;
/// Splits keep runs of this many rows together where they can, so that tiles stay whole.
const SPLIT_ROWS: usize = 64;

/// Shape and layout of one packed matrix per group.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    /// What it holds, e.g. `experts.gate_up`.
    pub name: &'static str,
    /// Matrices: experts, or 1.
    pub groups: usize,
    /// Rows of each, gate and up counted apart.
    pub rows: usize,
    /// Columns of each.
    pub cols: usize,
    /// Codes and scales.
    pub parts: Parts,
    /// 2 if gate and up rows alternate, else 1.
    pub pair: usize,
    /// Whether each row has a bias.
    pub bias: bool,
    /// Where everything lies.
    pub segments: Vec<Segment>,
}

/// One buffer of packed rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Size in words, a multiple of 4.
    pub words: usize,
    /// Runs of rows, at most one a group.
    pub spans: Vec<Span>,
}

/// Rows of one group in one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The group.
    pub group: usize,
    /// First row.
    pub row_begin: usize,
    /// Behind the last row.
    pub row_end: usize,
    /// Word where the codes begin, a multiple of 4.
    pub codes: usize,
    /// Word where the block scales begin.
    pub scales: usize,
    /// Word where the bias begins.
    pub bias: usize,
    /// Word where the row scales begin.
    pub row_scales: usize,
    /// Word where the columns' blocks begin.
    pub order: usize,
    /// Block (in the checkpoint's rows) of `row_begin`.
    pub first_block: usize,
}

/// Where the rows of a packed matrix come from.
pub struct GroupSource<'a> {
    /// One matrix, or gate and up, whose rows alternate.
    pub matrices: Vec<&'a Matrix<'a>>,
    /// A bias for each matrix, or none.
    pub biases: Vec<&'a [f32]>,
}

impl PackedMatrix {
    /// Codes in a vector of 16 bytes.
    pub fn codes_per_vec(&self) -> usize {
        VEC_WORDS * 32 / self.parts.code.bits()
    }

    /// Vectors of a row.
    pub fn vecs_per_row(&self) -> usize {
        self.cols.div_ceil(self.codes_per_vec())
    }

    /// The blocks that share scales; `None` without any.
    pub fn blocks(&self) -> Option<PackedBlocks> {
        self.parts.blocks.map(|Blocks { rows, cols, scale, act_order }| {
            let cols = cols.unwrap_or(self.cols);
            let per_row = self.cols.div_ceil(cols);
            PackedBlocks { rows, cols, per_row, scale, words: scale.words(per_row), act_order }
        })
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| 4 * segment.words as u64).sum()
    }

    fn block_of(&self, row: usize) -> usize {
        self.blocks().map_or(0, |blocks| row / (self.pair * blocks.rows))
    }

    /// Words of the codes, block scales, row scales, orders and bias of rows `begin..end`.
    fn words(&self, begin: usize, end: usize) -> [usize; 5] {
        let rows = end - begin;
        let scale_rows = (self.block_of(end - 1) - self.block_of(begin) + 1) * self.pair;
        let (scales, order) = self.blocks().map_or((0, 0), |blocks| {
            (scale_rows * blocks.words, if blocks.act_order { self.pair * self.cols } else { 0 })
        });
        let row_scales = if self.parts.row_scale { rows } else { 0 };
        let bias = if self.bias { rows } else { 0 };
        [rows * self.vecs_per_row() * VEC_WORDS, scales, row_scales, order, bias]
    }

    /// Assigns every row a place in segments of at most `segment_bytes`.
    ///
    /// # Errors
    /// A row (or a pair of gate and up rows) that does not fit a segment.
    pub fn place(mut self, backend: &'static str, segment_bytes: u64) -> Result<Self, Unsupported> {
        // Word indices are u32 in the kernels.
        let capacity = usize::try_from(segment_bytes.min(1 << 34) / 16 * 4).unwrap_or(0);
        let padded = |words: [usize; 5]| words.iter().sum::<usize>().next_multiple_of(VEC_WORDS);
        let mut segments: Vec<Segment> = Vec::new();
        for group in 0..self.groups {
            let mut begin = 0;
            while begin < self.rows {
                let used = segments.last().map_or(capacity, |segment| segment.words);
                let free = capacity - used;
                let rest = self.rows - begin;
                // Largest number of pairs of rows that fit, by bisection.
                let (mut fits, mut too_many) = (0, rest / self.pair + 1);
                while too_many - fits > 1 {
                    let middle = fits.midpoint(too_many);
                    if padded(self.words(begin, begin + middle * self.pair)) <= free {
                        fits = middle;
                    } else {
                        too_many = middle;
                    }
                }
                let mut rows = fits * self.pair;
                if rows < rest && rows > SPLIT_ROWS {
                    rows -= rows % SPLIT_ROWS;
                }
                if rows == 0 {
                    if used == 0 && !segments.is_empty() {
                        return Err(Unsupported {
                            backend: backend.into(),
                            field: "segment_bytes".into(),
                            value: segment_bytes.to_string(),
                            because: format!("{}: a row of {} columns does not fit a segment", self.name, self.cols)
                                .into(),
                        });
                    }
                    segments.push(Segment { words: 0, spans: Vec::new() });
                    continue;
                }
                let words = self.words(begin, begin + rows);
                let Some(segment) = segments.last_mut() else { continue };
                let codes = segment.words;
                let [scales, row_scales, order, bias] =
                    [1, 2, 3, 4].map(|part| codes + words[..part].iter().sum::<usize>());
                segment.spans.push(Span {
                    group,
                    row_begin: begin,
                    row_end: begin + rows,
                    codes,
                    scales,
                    bias,
                    row_scales,
                    order,
                    first_block: self.block_of(begin),
                });
                segment.words += padded(words);
                begin += rows;
                if begin < self.rows {
                    // The span table has one run a group and segment: the rest begins another segment.
                    segments.push(Segment { words: 0, spans: Vec::new() });
                }
            }
        }
        self.segments = segments;
        Ok(self)
    }

    /// Most rows of one group in `segment`.
    pub fn max_span_rows(&self, segment: usize) -> usize {
        let spans = self.segments.get(segment).map_or(&[][..], |segment| &segment.spans);
        spans.iter().map(|span| span.row_end - span.row_begin).max().unwrap_or(0)
    }

    /// Vectors from one matrix to the next, where a segment holds whole matrices alone.
    pub fn whole_matrix_vecs(&self, segment: usize) -> Option<usize> {
        let spans = self.segments.get(segment).map_or(&[][..], |segment| &segment.spans);
        let whole = spans.iter().all(|span| span.row_begin == 0 && span.row_end == self.rows);
        whole.then(|| self.words(0, self.rows).iter().sum::<usize>().div_ceil(VEC_WORDS))
    }

    /// The span table of `segment`: [groups, `SPAN_WORDS`]; a group that is not here has no rows.
    pub fn span_table(&self, segment: usize) -> Vec<u32> {
        let mut table = vec![0u32; self.groups * SPAN_WORDS];
        for span in self.segments.get(segment).map_or(&[][..], |segment| &segment.spans) {
            let Span { group, row_begin, row_end, codes, scales, bias, row_scales, order, first_block } = *span;
            let row = [row_begin, row_end, codes / VEC_WORDS, scales, bias, first_block, row_scales, order];
            for (word, value) in table[group * SPAN_WORDS..].iter_mut().zip(row) {
                *word = value as u32;
            }
        }
        table
    }

    /// Refuses matrices that are not those of this layout; [`MoeWeights::check`](crate::MoeWeights::check) has
    /// seen to it that those of the spec are.
    pub(crate) fn require(&self, source: &GroupSource<'_>) -> Result<()> {
        // The blocks of a piece are cut finer than those of the matrix that it is a piece of.
        let kind = |parts: Parts| {
            let scale = parts.blocks.map(|Blocks { rows: _, cols: _, scale, act_order }| (scale, act_order));
            (parts.code, scale, parts.row_scale)
        };
        let found: Vec<_> = source.matrices.iter().map(|matrix| (matrix.shape(), kind(matrix.parts()))).collect();
        let wanted = vec![([self.rows / self.pair, self.cols], kind(self.parts)); self.pair];
        let biases = source.biases.iter().map(|bias| bias.len());
        let biased = !self.bias || biases.eq(std::iter::repeat_n(self.rows / self.pair, self.pair));
        match found == wanted && biased {
            true => Ok(()),
            false => {
                let bias = |biased: bool| if biased { " with biases" } else { "" };
                let found = format!("{found:?}{}", bias(!source.biases.is_empty()));
                let wanted = format!("{wanted:?}{}", bias(self.bias));
                Err(Error::invalid(self.name, found, wanted, "make weights and spec agree"))
            }
        }
    }

    /// Writes `segment` in pieces of some megabytes: `write(first word, words)`.
    ///
    /// # Errors
    /// Whatever `source` or `write` returns.
    pub fn pack<'a>(
        &self,
        segment: usize,
        source: &dyn Fn(usize) -> Result<GroupSource<'a>>,
        write: &mut dyn FnMut(usize, &[u32]) -> Result<()>,
    ) -> Result<()> {
        const PIECE_WORDS: usize = 1 << 20;
        let row_words = self.vecs_per_row() * VEC_WORDS;
        for span in self.segments.get(segment).map_or(&[][..], |segment| &segment.spans) {
            let source = source(span.group)?;
            let rows_per_piece = (PIECE_WORDS / row_words).max(1);
            for begin in (span.row_begin..span.row_end).step_by(rows_per_piece) {
                let end = (begin + rows_per_piece).min(span.row_end);
                let mut words = vec![0u32; (end - begin) * row_words];
                for (row, words) in (begin..end).zip(words.chunks_exact_mut(row_words)) {
                    self.pack_row(source.matrices[row % self.pair], row / self.pair, words);
                }
                write(span.codes + (begin - span.row_begin) * row_words, &words)?;
            }
            if let Some(packed) = self.blocks() {
                let blocks = span.first_block..=self.block_of(span.row_end - 1);
                let mut words = Vec::with_capacity(blocks.clone().count() * self.pair * packed.words);
                for block in blocks {
                    for matrix in &source.matrices {
                        let row = (block * packed.rows).min(matrix.shape()[0] - 1);
                        packed.pack_row(matrix, row, &mut words);
                    }
                }
                write(span.scales, &words)?;
                if packed.act_order {
                    let order = |matrix: &&Matrix<'_>| -> Vec<u32> {
                        (0..self.cols).map(|col| matrix.block_of(col) as u32).collect()
                    };
                    let words: Vec<u32> = source.matrices.iter().flat_map(order).collect();
                    write(span.order, &words)?;
                }
            }
            if self.parts.row_scale {
                let scale = |row: usize| source.matrices[row % self.pair].row_scale(row / self.pair).to_bits();
                let words: Vec<u32> = (span.row_begin..span.row_end).map(scale).collect();
                write(span.row_scales, &words)?;
            }
            if self.bias {
                let bias = |row: usize| source.biases[row % self.pair][row / self.pair].to_bits();
                let words: Vec<u32> = (span.row_begin..span.row_end).map(bias).collect();
                write(span.bias, &words)?;
            }
        }
        Ok(())
    }

    /// The weight at (row, column) of a packed run, as the kernels decode it: [`Matrix::get`] of where it came from.
    pub fn value(&self, segment: &[u32], span: &Span, row: usize, col: usize) -> f32 {
        let Parts { code, blocks: _, row_scale } = self.parts;
        let per_word = self.codes_per_vec() / VEC_WORDS;
        let first = span.codes + (row - span.row_begin) * self.vecs_per_row() * VEC_WORDS;
        let word = segment[first + col / per_word] >> (code.bits() * (col % per_word));
        let value = numerics::decode(code, word & (u32::MAX >> (32 - code.bits())));
        let scaled = self.blocks().map_or(value, |blocks| {
            let scale_row = blocks.scale_row(self.pair, row, span.first_block);
            let words = &segment[span.scales + scale_row * blocks.words..][..blocks.words];
            let block = match blocks.act_order {
                true => segment[span.order + row % self.pair * self.cols + col] as usize,
                false => col / blocks.cols,
            };
            let [scale, zero, min] = blocks.scale_of(words, block);
            (value - zero) * scale - min
        });
        scaled * if row_scale { f32::from_bits(segment[span.row_scales + row - span.row_begin]) } else { 1.0 }
    }

    fn pack_row(&self, matrix: &Matrix<'_>, row: usize, words: &mut [u32]) {
        let per_word = self.codes_per_vec() / VEC_WORDS;
        let bits = 32 / per_word as u32;
        for col in 0..self.cols {
            words[col / per_word] |= matrix.code(row, col) << (bits * (col % per_word) as u32);
        }
    }
}

/// The blocks of a packed matrix that share scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedBlocks {
    /// Rows of a block, gate and up counted apart.
    pub rows: usize,
    /// Columns of a block.
    pub cols: usize,
    /// Blocks of a row.
    pub per_row: usize,
    /// How a scale is kept.
    pub scale: PackedScale,
    /// Words of the scales of a row of blocks.
    pub words: usize,
    /// Whether a table says which block a column belongs to.
    pub act_order: bool,
}

impl PackedBlocks {
    /// Row of the scales of packed row `row`, in a span whose first block is `first_block`. Twin:
    /// shaders/fragments/scale_row.wgsl
    pub(crate) fn scale_row(&self, pair: usize, row: usize, first_block: usize) -> usize {
        (row / (pair * self.rows) - first_block) * pair + row % pair
    }

    /// Appends the scales of the row of blocks that begins at `row`.
    fn pack_row(&self, matrix: &Matrix<'_>, row: usize, words: &mut Vec<u32>) {
        let first = words.len();
        words.resize(first + self.words, 0);
        let words = &mut words[first..];
        let cols = matrix.shape()[1];
        for block in 0..self.per_row {
            let bits = |width: usize| (block * width / 32, (block * width % 32) as u32);
            // The stored block, of which this one may be a piece.
            let stored = match self.act_order {
                true => block,
                false => matrix.block_of((block * self.cols).min(cols - 1)),
            };
            match self.scale {
                PackedScale::F32 => words[block] = matrix.scale_bits(row, stored),
                PackedScale::F16Zero | PackedScale::Bf16Zero => {
                    words[block] = matrix.scale_bits(row, stored) | matrix.zero(row, stored) << 16;
                }
                PackedScale::F16 | PackedScale::Bf16 => {
                    let (word, shift) = bits(16);
                    words[word] |= matrix.scale_bits(row, stored) << shift;
                }
                PackedScale::E8m0 | PackedScale::E4m3 => {
                    let (word, shift) = bits(8);
                    words[word] |= matrix.scale_bits(row, stored) << shift;
                }
                PackedScale::Q4K if block % 8 == 0 => {
                    words[block / 8 * 5..][..5].copy_from_slice(&matrix.super_block(row, stored / 8));
                }
                PackedScale::Q6K if block % 16 == 0 => {
                    words[block / 16 * 5..][..5].copy_from_slice(&matrix.super_block(row, stored / 16));
                }
                PackedScale::Q4K | PackedScale::Q6K => {}
            }
        }
    }

    /// Scale, zero and minimum of a block, from the words of its row. Twin: shaders/fragments/scale_*.wgsl
    pub(crate) fn scale_of(&self, words: &[u32], block: usize) -> [f32; 3] {
        let byte = || (words[block / 4] >> (8 * (block % 4))) as u8;
        let half = || (words[block / 2] >> (16 * (block % 2))) as u16;
        let only = |scale: f32| [scale, 0.0, 0.0];
        let five = |at: usize| -> [u32; 5] { std::array::from_fn(|word| words[5 * at + word]) };
        match self.scale {
            PackedScale::F32 => only(f32::from_bits(words[block])),
            PackedScale::F16 => only(numerics::decode_f16(half())),
            PackedScale::Bf16 => only(numerics::decode_bf16(half())),
            PackedScale::E8m0 => only(numerics::decode_e8m0(byte())),
            PackedScale::E4m3 => only(numerics::decode_e4m3(byte())),
            PackedScale::F16Zero => [numerics::decode_f16(words[block] as u16), (words[block] >> 16) as f32, 0.0],
            PackedScale::Bf16Zero => [numerics::decode_bf16(words[block] as u16), (words[block] >> 16) as f32, 0.0],
            PackedScale::Q4K => {
                let [scale, min] = numerics::q4_k_scale(&five(block / 8), block % 8);
                [scale, 0.0, min]
            }
            PackedScale::Q6K => only(numerics::q6_k_scale(&five(block / 16), block % 16)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{ScaleFormat, WeightFormat};

    fn matrix(rows: usize, cols: usize, format: WeightFormat, pair: usize, bias: bool) -> PackedMatrix {
        PackedMatrix { name: "test", groups: 5, rows, cols, parts: format.parts(), pair, bias, segments: vec![] }
    }

    fn formats() -> [WeightFormat; 4] {
        let fp8 = WeightFormat::Fp8Block { block: [8, 16], scale: ScaleFormat::F32 };
        [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, fp8]
    }

    #[test]
    fn every_row_has_one_place_and_a_group_one_run_a_segment() {
        for format in formats() {
            for (rows, pair) in [(2, 2), (130, 2), (200, 2), (131, 1), (1000, 2)] {
                for segment_bytes in [1 << 10, 5000, 8192, 70_000, 1 << 20] {
                    let placed = matrix(rows, 33, format, pair, true).place("test", segment_bytes).unwrap();
                    let mut seen = vec![0; 5 * rows];
                    for segment in &placed.segments {
                        assert!(4 * segment.words as u64 <= segment_bytes && segment.words % 4 == 0);
                        let mut groups: Vec<_> = segment.spans.iter().map(|span| span.group).collect();
                        groups.dedup();
                        assert_eq!(groups.len(), segment.spans.len(), "two runs of a group in one segment");
                        let mut end = 0;
                        for span in &segment.spans {
                            assert!(span.codes >= end && span.row_begin % pair == 0 && span.row_begin < span.row_end);
                            let [codes, scales, row_scales, order, bias] = placed.words(span.row_begin, span.row_end);
                            assert_eq!(
                                [span.scales, span.row_scales],
                                [span.codes + codes, span.codes + codes + scales]
                            );
                            assert_eq!([span.order, span.bias], [span.row_scales + row_scales, span.order + order]);
                            end = span.bias + bias;
                            for row in span.row_begin..span.row_end {
                                seen[span.group * rows + row] += 1;
                            }
                        }
                        assert!(end <= segment.words);
                    }
                    assert!(seen.iter().all(|&count| count == 1), "{rows} rows, {segment_bytes} bytes");
                }
            }
        }
    }

    #[test]
    fn a_row_that_fits_no_segment_is_refused_by_name() {
        let refusal = matrix(4, 1000, WeightFormat::F32, 2, false).place("gpu", 4000).unwrap_err();
        assert_eq!(refusal.field, "segment_bytes");
        assert!(refusal.to_string().contains("1000 columns"), "{refusal}");
    }
}
