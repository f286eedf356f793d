//! `quantize`: rows to codes and scales.

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
    /// One scale. Twin: shaders/fragments/input_scale_*.wgsl
    pub(super) fn read(self, words: &[u32], row: usize, group: usize, groups: usize) -> f32 {
        match self {
            Self::RowMajor => f32::from_bits(words[row * groups + group]),
            Self::ColumnMajor { stride } => f32::from_bits(words[group * stride + row]),
            Self::Packed => {
                let word = words[row * groups.div_ceil(4) + group / 4];
                crate::numerics::decode_e8m0((word >> (8 * (group % 4))) as u8)
            }
        }
    }
}
