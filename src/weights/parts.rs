//! Formats taken apart into codes and scales: what kernels and packed weights have to know of them.

use crate::spec::{ScaleFormat, WeightFormat};

/// One code of a format, without its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// E4M3FN.
    E4m3,
    /// E2M1.
    E2m1,
    /// Two's complement, 8 bits.
    Int8,
    /// Four bits less 8.
    Int4,
    /// Four bits, 0 to 15.
    Uint4,
}

impl Code {
    /// Size of a code.
    pub fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::E4m3 | Self::Int8 => 8,
            Self::E2m1 | Self::Int4 | Self::Uint4 => 4,
        }
    }
}

/// One scale, as the kernels keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackedScale {
    /// A word.
    F32,
    /// 16 bits.
    F16,
    /// 16 bits.
    Bf16,
    /// A byte.
    E8m0,
    /// A byte.
    E4m3,
    /// A word: an f16 scale, above it the zero.
    F16Zero,
    /// A word: a bf16 scale, above it the zero.
    Bf16Zero,
    /// Five words for 8 blocks: d and dmin, then sc and m of each block.
    Q4K,
    /// Five words for 16 blocks: d, then sc of each block.
    Q6K,
}

impl PackedScale {
    /// Words of a row of `blocks` scales.
    pub fn words(self, blocks: usize) -> usize {
        match self {
            Self::F32 | Self::F16Zero | Self::Bf16Zero => blocks,
            Self::F16 | Self::Bf16 => blocks.div_ceil(2),
            Self::E8m0 | Self::E4m3 => blocks.div_ceil(4),
            Self::Q4K => 5 * blocks.div_ceil(8),
            Self::Q6K => 5 * blocks.div_ceil(16),
        }
    }
}

/// Scales that blocks of a matrix have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Rows that share a scale.
    pub rows: usize,
    /// Columns that share a scale; `None` for all.
    pub cols: Option<usize>,
    /// One of them.
    pub scale: PackedScale,
    /// Whether a table says which block a column belongs to.
    pub act_order: bool,
}

/// A format taken apart: what a kernel has to know of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// One code.
    pub code: Code,
    /// Scales of blocks.
    pub blocks: Option<Blocks>,
    /// Whether each row has an f32 scale besides.
    pub row_scale: bool,
}

impl Parts {
    /// Those of a matrix that begins at row `row` of one of these. Blocks that a cut goes through become smaller
    /// ones, each with the scale of the block that it is a piece of.
    pub fn cut_rows(self, row: usize) -> Self {
        let cut = |blocks: Blocks| Blocks { rows: piece(blocks.rows, row), ..blocks };
        Self { blocks: self.blocks.map(cut), ..self }
    }

    /// Those of some of the columns of one of these, from `col` on. `None` where a piece has no scale of its own:
    /// inside of a super-block, or with an order of columns.
    pub fn cut_cols(self, col: usize) -> Option<Self> {
        let Some(Blocks { rows, cols, scale, act_order }) = self.blocks else { return Some(self) };
        let whole = match scale {
            PackedScale::Q4K | PackedScale::Q6K => 256,
            PackedScale::F32
            | PackedScale::F16
            | PackedScale::Bf16
            | PackedScale::E8m0
            | PackedScale::E4m3
            | PackedScale::F16Zero
            | PackedScale::Bf16Zero => 1,
        };
        if act_order || !col.is_multiple_of(whole) {
            return None;
        }
        let blocks = Blocks { rows, cols: cols.map(|cols| piece(cols, col)), scale, act_order };
        Some(Self { blocks: Some(blocks), ..self })
    }
}

/// The largest size of pieces in which a run of blocks of `block` can be counted from `first` on.
fn piece(block: usize, first: usize) -> usize {
    let (mut a, mut b) = (block, first % block);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl WeightFormat {
    /// Its codes and scales.
    pub fn parts(self) -> Parts {
        let plain = |code| Parts { code, blocks: None, row_scale: false };
        let rows = |code| Parts { code, blocks: None, row_scale: true };
        let blocks = |code, rows, cols, scale| Parts {
            code,
            blocks: Some(Blocks { rows, cols: Some(cols), scale, act_order: false }),
            row_scale: false,
        };
        match self {
            Self::F32 => plain(Code::F32),
            Self::F16 => plain(Code::F16),
            Self::Bf16 => plain(Code::Bf16),
            Self::Fp8Block { block: [rows, cols], scale } => blocks(Code::E4m3, rows, cols, scale.packed()),
            Self::Fp8Tensor | Self::Fp8Channel => rows(Code::E4m3),
            Self::Int8Channel => rows(Code::Int8),
            Self::Mxfp4 => blocks(Code::E2m1, 1, 32, PackedScale::E8m0),
            Self::Nvfp4 => {
                let Parts { code, blocks, row_scale: _ } = blocks(Code::E2m1, 1, 16, PackedScale::E4m3);
                Parts { code, blocks, row_scale: true }
            }
            Self::Int4 { group, scale, zero_points, act_order } => {
                let (code, scale) = match (zero_points, scale) {
                    (false, ScaleFormat::F32 | ScaleFormat::F16 | ScaleFormat::Bf16 | ScaleFormat::E8m0) => {
                        (Code::Int4, scale.packed())
                    }
                    (true, ScaleFormat::Bf16) => (Code::Uint4, PackedScale::Bf16Zero),
                    // `validate` refuses the other two.
                    (true, ScaleFormat::F16 | ScaleFormat::F32 | ScaleFormat::E8m0) => {
                        (Code::Uint4, PackedScale::F16Zero)
                    }
                };
                Parts { code, blocks: Some(Blocks { rows: 1, cols: group, scale, act_order }), row_scale: false }
            }
            Self::Q8_0 => blocks(Code::Int8, 1, 32, PackedScale::F16),
            Self::Q4K => blocks(Code::Uint4, 1, 32, PackedScale::Q4K),
            Self::Q6K => blocks(Code::Int8, 1, 16, PackedScale::Q6K),
        }
    }
}

/// A block of GGUF: the codes of a run of columns and their scales, side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GgufBlock {
    /// An f16 scale, then codes of a byte.
    Q8_0,
    /// d, dmin, twelve bytes of scales and minima, then nibbles.
    Q4K,
    /// The low four bits, the high two, 16 scales, then d.
    Q6K,
    /// An E8M0 byte, then nibbles.
    Mxfp4,
}

impl GgufBlock {
    /// That of a format, if GGUF has one.
    pub(crate) fn of(format: WeightFormat) -> Option<Self> {
        match format {
            WeightFormat::Q8_0 => Some(Self::Q8_0),
            WeightFormat::Q4K => Some(Self::Q4K),
            WeightFormat::Q6K => Some(Self::Q6K),
            WeightFormat::Mxfp4 => Some(Self::Mxfp4),
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Fp8Block { block: _, scale: _ }
            | WeightFormat::Fp8Tensor
            | WeightFormat::Fp8Channel
            | WeightFormat::Int8Channel
            | WeightFormat::Nvfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ } => None,
        }
    }

    /// What such blocks mean.
    pub(crate) fn format(self) -> WeightFormat {
        match self {
            Self::Q8_0 => WeightFormat::Q8_0,
            Self::Q4K => WeightFormat::Q4K,
            Self::Q6K => WeightFormat::Q6K,
            Self::Mxfp4 => WeightFormat::Mxfp4,
        }
    }

    /// Columns of one.
    pub(crate) const fn cols(self) -> usize {
        match self {
            Self::Q8_0 | Self::Mxfp4 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q6K => 210,
            Self::Mxfp4 => 17,
        }
    }
}

impl ScaleFormat {
    fn packed(self) -> PackedScale {
        match self {
            Self::F32 => PackedScale::F32,
            Self::F16 => PackedScale::F16,
            Self::Bf16 => PackedScale::Bf16,
            Self::E8m0 => PackedScale::E8m0,
        }
    }
}
