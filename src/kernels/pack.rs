//! `pack`: checkpoint matrices to the layout that the GEMM kernels read. Changes no value.
//!
//! The rows of a group (an expert) stand one behind the other, each padded with zero codes to whole
//! vectors of 16 bytes. Gate and up rows alternate (gate of feature 0, up of feature 0, ...), so that
//! a tile holds both. Groups fill *segments*, buffers no larger than a binding may be; a group that
//! does not fit the rest of a segment is split between two rows. Each run of rows in a segment is a
//! [`Span`]: its codes, then its block scales (f32), then its bias (f32).

use crate::error::{Result, Unsupported};
use crate::spec::WeightFormat;
use crate::weights::Matrix;

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
    /// Type of a code.
    pub format: WeightFormat,
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
        match self.format {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::Bf16 => 8,
            WeightFormat::Fp8Block { block: _, scale: _ } => 16,
        }
    }

    /// Vectors of a row.
    pub fn vecs_per_row(&self) -> usize {
        self.cols.div_ceil(self.codes_per_vec())
    }

    /// [rows, columns] of a scale block and blocks of a row; `None` without scales.
    pub fn blocks(&self) -> Option<([usize; 2], usize)> {
        match self.format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
            WeightFormat::Fp8Block { block, scale: _ } => Some((block, self.cols.div_ceil(block[1]))),
        }
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| 4 * segment.words as u64).sum()
    }

    fn block_of(&self, row: usize) -> usize {
        self.blocks().map_or(0, |([rows, _], _)| row / (self.pair * rows))
    }

    /// Words of the codes, scales and bias of rows `begin..end`.
    fn words(&self, begin: usize, end: usize) -> [usize; 3] {
        let rows = end - begin;
        let scales = self
            .blocks()
            .map_or(0, |(_, per_row)| (self.block_of(end - 1) - self.block_of(begin) + 1) * self.pair * per_row);
        [rows * self.vecs_per_row() * VEC_WORDS, scales, if self.bias { rows } else { 0 }]
    }

    /// Assigns every row a place in segments of at most `segment_bytes`.
    ///
    /// # Errors
    /// A row (or a pair of gate and up rows) that does not fit a segment.
    pub fn place(mut self, backend: &'static str, segment_bytes: u64) -> Result<Self, Unsupported> {
        // Word indices are u32 in the kernels; bindings stay below 2^31 bytes anyway.
        let capacity = usize::try_from(segment_bytes.min(1 << 31) / 16 * 4).unwrap_or(0);
        let padded = |words: [usize; 3]| words.iter().sum::<usize>().next_multiple_of(VEC_WORDS);
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
                segment.spans.push(Span {
                    group,
                    row_begin: begin,
                    row_end: begin + rows,
                    codes,
                    scales: codes + words[0],
                    bias: codes + words[0] + words[1],
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

    /// The span table of `segment`: [groups, `SPAN_WORDS`]; a group that is not here has no rows.
    pub fn span_table(&self, segment: usize) -> Vec<u32> {
        let mut table = vec![0u32; self.groups * SPAN_WORDS];
        for span in self.segments.get(segment).map_or(&[][..], |segment| &segment.spans) {
            let Span { group, row_begin, row_end, codes, scales, bias, first_block } = *span;
            let row = [row_begin, row_end, codes / VEC_WORDS, scales, bias, first_block];
            for (word, value) in table[group * SPAN_WORDS..].iter_mut().zip(row) {
                *word = value as u32;
            }
        }
        table
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
            if let Some(([block_rows, block_cols], per_row)) = self.blocks() {
                let blocks = span.first_block..=self.block_of(span.row_end - 1);
                let mut words = Vec::with_capacity(blocks.clone().count() * self.pair * per_row);
                for block in blocks {
                    for matrix in &source.matrices {
                        let row = (block * block_rows).min(matrix.shape()[0] - 1);
                        words.extend((0..per_row).map(|col| matrix.scale(row, col * block_cols).to_bits()));
                    }
                }
                write(span.scales, &words)?;
            }
            if self.bias {
                let bias = |row: usize| source.biases[row % self.pair][row / self.pair].to_bits();
                let words: Vec<u32> = (span.row_begin..span.row_end).map(bias).collect();
                write(span.bias, &words)?;
            }
        }
        Ok(())
    }

    fn pack_row(&self, matrix: &Matrix<'_>, row: usize, words: &mut [u32]) {
        let per_word = self.codes_per_vec() / VEC_WORDS;
        let bits = 32 / per_word as u32;
        for col in 0..self.cols {
            words[col / per_word] |= matrix.code(row, col) << (bits * (col % per_word) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Orientation, ScaleFormat};
    use crate::weights::{Dtype, Rows, Tensor};

    fn matrix(rows: usize, cols: usize, format: WeightFormat, pair: usize, bias: bool) -> PackedMatrix {
        PackedMatrix { name: "test", groups: 5, rows, cols, format, pair, bias, segments: vec![] }
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
                            let [codes, scales, bias] = placed.words(span.row_begin, span.row_end);
                            assert_eq!([span.scales, span.bias], [span.codes + codes, span.codes + codes + scales]);
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

    #[test]
    fn packing_moves_codes_scales_and_biases_and_changes_none() {
        let (rows, cols) = (70, 35);
        for format in formats() {
            let (dtype, size) = match format {
                WeightFormat::F32 => (Dtype::F32, 4),
                WeightFormat::F16 => (Dtype::F16, 2),
                WeightFormat::Bf16 => (Dtype::BF16, 2),
                WeightFormat::Fp8Block { block: _, scale: _ } => (Dtype::F8_E4M3, 1),
            };
            let bytes = |salt: usize| (0..rows * cols * size).map(|at| (at * 31 + salt) as u8).collect::<Vec<u8>>();
            let scales =
                |salt: usize| (0..9 * 3).flat_map(|at| ((at + salt) as f32).to_le_bytes()).collect::<Vec<u8>>();
            let stored = [(bytes(1), scales(1)), (bytes(2), scales(100))];
            let views = [0, 1].map(|at: usize| {
                let shape = |shape: &[usize]| shape.to_vec();
                let (codes, scales) = &stored[at];
                let tensor = Tensor { name: "w".into(), dtype, shape: shape(&[rows, cols]), bytes: codes };
                let scale = Tensor { name: "s".into(), dtype: Dtype::F32, shape: shape(&[9, 3]), bytes: scales };
                let scale = (size == 1).then_some(&scale);
                Matrix::view(&tensor, scale, format, Orientation::OutIn, Rows::All, None, [rows, cols]).unwrap()
            });
            let biases = [0, 1].map(|salt| (0..rows).map(|row| (row + 1000 * salt) as f32).collect::<Vec<_>>());
            let placed = matrix(2 * rows, cols, format, 2, true).place("test", 3000).unwrap();
            let per_word = placed.codes_per_vec() / VEC_WORDS;
            for (at, segment) in placed.segments.iter().enumerate() {
                let mut memory = vec![0u32; segment.words];
                let source = |_| {
                    Ok(GroupSource {
                        matrices: views.iter().collect(),
                        biases: biases.iter().map(Vec::as_slice).collect(),
                    })
                };
                let write = &mut |first: usize, words: &[u32]| {
                    memory[first..first + words.len()].copy_from_slice(words);
                    Ok(())
                };
                placed.pack(at, &source, write).unwrap();
                for span in &segment.spans {
                    for row in span.row_begin..span.row_end {
                        let (matrix, feature) = (&views[row % 2], row / 2);
                        let codes = span.codes + (row - span.row_begin) * placed.vecs_per_row() * VEC_WORDS;
                        for col in 0..cols {
                            let word = memory[codes + col / per_word];
                            let bits = 32 / per_word as u32;
                            let code =
                                word.checked_shr(bits * (col % per_word) as u32).unwrap() & (u32::MAX >> (32 - bits));
                            assert_eq!(code, matrix.code(feature, col));
                            if let Some(([block_rows, block_cols], per_row)) = placed.blocks() {
                                let block = (feature / block_rows - span.first_block) * 2 + row % 2;
                                let scale = memory[span.scales + block * per_row + col / block_cols];
                                assert_eq!(f32::from_bits(scale), matrix.scale(feature, col));
                            }
                        }
                        let bias = memory[span.bias + row - span.row_begin];
                        assert_eq!(f32::from_bits(bias), biases[row % 2][feature]);
                    }
                }
            }
        }
    }
}
