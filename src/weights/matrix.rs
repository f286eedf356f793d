//! One matrix seen in its stored bytes, whatever the checkpoint's layout.
//!
//! A long file: every arrangement of codes, scales and zeros, each next to the check of its sizes.

use std::borrow::Cow;
use std::ops::Range;

use safetensors::Dtype;

use super::parts::{Blocks, Code, GgufBlock, PackedScale, Parts};
use super::tensor::{Tensor, expect_shape};
use crate::error::{Error, Result};
use crate::numerics;
use crate::spec::{GateUpLayout, Orientation, WeightFormat};

/// Which rows of a stored tensor a matrix takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// All of them.
    All,
    /// The gate rows of a fused gate and up tensor.
    Gate(GateUpLayout),
    /// Its up rows.
    Up(GateUpLayout),
}

/// The tensors of one matrix, or of a stack of them, as a checkpoint arranges them. Shapes are those of one
/// matrix [out, in]; stacked ones have one more dimension in front.
#[derive(Debug, Clone, Copy)]
pub enum Stored<'t, 'a> {
    /// Values without scales.
    Plain(&'t Tensor<'a>),
    /// Codes [out, in] and their scales. 4-bit codes lie two to a byte, the low one first, as I8 or U8
    /// [out, in / 2] or as U8 [out, in / 32, 16]; a scale a matrix is [] or \[1\], a scale a row \[out\] or [out, 1].
    Scaled {
        /// The codes.
        codes: &'t Tensor<'a>,
        /// F32, F16, BF16, F8_E8M0, or U8 that means E8M0.
        scales: &'t Tensor<'a>,
    },
    /// NVFP4: codes U8 [out, in / 2], scales F8_E4M3 [out, in / 16], one F32 for the matrix.
    Nvfp4 {
        /// The codes.
        codes: &'t Tensor<'a>,
        /// The block scales.
        scales: &'t Tensor<'a>,
        /// [] or \[1\].
        global: &'t Tensor<'a>,
        /// Whether weights are divided by the global scale (compressed-tensors) or multiplied (ModelOpt).
        divides: bool,
    },
    /// compressed-tensors' pack-quantized INT4: I32 [out, in / 8], eight codes along `in`, the lowest first.
    PackQuantized {
        /// The codes.
        codes: &'t Tensor<'a>,
        /// [out, groups].
        scales: &'t Tensor<'a>,
        /// I32 [out / 8, groups], eight along `out`.
        zeros: Option<&'t Tensor<'a>>,
        /// I32 `[in]`.
        g_idx: Option<&'t Tensor<'a>>,
    },
    /// GPTQ: I32 [in / 8, out], eight codes along `in`.
    Gptq {
        /// `qweight`.
        codes: &'t Tensor<'a>,
        /// [groups, out].
        scales: &'t Tensor<'a>,
        /// `qzeros`, I32 [groups, out / 8].
        zeros: &'t Tensor<'a>,
        /// Whether zeros are stored less 1 (the legacy form).
        zeros_less_one: bool,
        /// I32 `[in]`.
        g_idx: Option<&'t Tensor<'a>>,
    },
    /// AWQ: I32 [in, out / 8], eight codes along `out` in the order 0, 2, 4, 6, 1, 3, 5, 7.
    Awq {
        /// `qweight`.
        codes: &'t Tensor<'a>,
        /// [groups, out].
        scales: &'t Tensor<'a>,
        /// `qzeros`, I32 [groups, out / 8] in the same order.
        zeros: &'t Tensor<'a>,
    },
    /// Blocks of GGUF, as U8 [out, bytes of a row].
    Gguf(&'t Tensor<'a>),
}

impl<'t, 'a> Stored<'t, 'a> {
    /// The tensor with the codes.
    pub fn codes(&self) -> &'t Tensor<'a> {
        match self {
            Self::Plain(codes)
            | Self::Gguf(codes)
            | Self::Scaled { codes, scales: _ }
            | Self::Nvfp4 { codes, scales: _, global: _, divides: _ }
            | Self::PackQuantized { codes, scales: _, zeros: _, g_idx: _ }
            | Self::Gptq { codes, scales: _, zeros: _, zeros_less_one: _, g_idx: _ }
            | Self::Awq { codes, scales: _, zeros: _ } => codes,
        }
    }
}

/// One matrix [rows, cols] seen in its stored bytes, so that stacked, transposed and interleaved layouts cost
/// no copy. Element (r, c) is read by [`Matrix::get`].
#[derive(Debug, Clone)]
pub struct Matrix<'a> {
    name: Cow<'a, str>,
    format: WeightFormat,
    parts: Parts,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
    arrangement: Arrangement,
    /// Our rows among the stored ones.
    first_row: usize,
    row_step: usize,
    /// Our first column among the stored ones.
    first_col: usize,
    scales: Option<Scales<'a>>,
    zeros: Option<Zeros<'a>>,
    row_scales: RowScales,
    /// Block of each column.
    order: Option<Vec<u32>>,
}

/// How codes lie in a matrix's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrangement {
    /// One behind the other; distances in codes. Of two in a byte the low one comes first.
    Strided { offset: usize, row: usize, col: usize },
    /// Words of eight codes along columns: word (col / 8) * stored rows + row.
    Gptq { offset: usize, stored_rows: usize },
    /// Words of eight codes along rows: word col * words + row / 8.
    Awq { offset: usize, words: usize },
    /// Rows of blocks; offset and distance of rows in bytes.
    Gguf { block: GgufBlock, offset: usize, row: usize },
}

/// Nibble of each of eight columns in AWQ's words.
const AWQ_NIBBLE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

#[derive(Debug, Clone)]
struct Scales<'a> {
    bytes: &'a [u8],
    element: usize,
    /// In elements.
    offset: usize,
    row: usize,
    col: usize,
}

#[derive(Debug, Clone)]
struct Zeros<'a> {
    bytes: &'a [u8],
    along: ZerosAlong,
    /// In words.
    offset: usize,
    /// Words of a row of the tensor.
    words: usize,
    less_one: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZerosAlong {
    /// [out / 8, groups].
    Groups,
    /// [groups, out / 8].
    Rows,
    /// Likewise, in AWQ's order.
    RowsAwq,
}

#[derive(Debug, Clone)]
enum RowScales {
    None,
    One(f32),
    /// By our rows.
    Each(Vec<f32>),
}

/// Where a matrix stands in its tensors.
struct Place {
    /// (entry, entries) of a stack.
    stack: Option<(usize, usize)>,
    /// Rows of a stored matrix.
    stored_rows: usize,
    cols: usize,
    first_row: usize,
    row_step: usize,
}

impl Place {
    fn entry(&self) -> usize {
        self.stack.map_or(0, |(entry, _)| entry)
    }

    /// Checks a tensor of one `plane` a matrix, and returns the elements before ours.
    fn locate(&self, tensor: &Tensor<'_>, plane: &[usize], element: usize) -> Result<usize> {
        let mut shape = plane.to_vec();
        if let Some((_, count)) = self.stack {
            shape.insert(0, count);
        }
        let bytes = shape.iter().try_fold(element, |bytes, size| bytes.checked_mul(*size));
        expect_shape(tensor, &shape, bytes)?;
        Ok(self.entry() * plane.iter().product::<usize>())
    }

    /// Likewise, of several shapes that mean the same.
    fn locate_any(&self, tensor: &Tensor<'_>, planes: &[&[usize]], element: usize) -> Result<usize> {
        let mut result = Ok(0);
        for plane in planes {
            result = self.locate(tensor, plane, element);
            if result.is_ok() {
                return result;
            }
        }
        result
    }
}

impl<'a> Matrix<'a> {
    /// The matrix [rows, cols] stored in `stored`, or in entry `stack.0` of `stack.1` stacked ones.
    ///
    /// # Errors
    /// A dtype or shape other than the format, layout and sizes imply, a missing or surplus scale, a scale
    /// that is NaN, infinite or not positive: with the name of the tensor.
    pub fn view(
        stored: Stored<'_, 'a>,
        format: WeightFormat,
        orientation: Orientation,
        part: Rows,
        stack: Option<(usize, usize)>,
        [rows, cols]: [usize; 2],
    ) -> Result<Self> {
        format.validate("format")?;
        let tensor = stored.codes();
        let limit = crate::spec::MAX_WIDTH;
        let stacked = stack.is_none_or(|(entry, count)| entry < count && count <= limit);
        if rows == 0 || cols == 0 || rows > limit || cols > limit || !stacked {
            return Err(Error::invalid(
                tensor.name.to_string(),
                format!("a view of {rows} x {cols}, entry {stack:?}"),
                format!("1 to {limit} rows, columns and entries, and an entry below their number"),
                "correct the sizes",
            ));
        }
        // Rows of the stored tensor, first row of ours, and the distance between ours.
        let (stored_rows, first_row, row_step) = match part {
            Rows::All | Rows::Gate(GateUpLayout::Separate) | Rows::Up(GateUpLayout::Separate) => (rows, 0, 1),
            Rows::Gate(GateUpLayout::Halves) => (2 * rows, 0, 1),
            Rows::Up(GateUpLayout::Halves) => (2 * rows, rows, 1),
            Rows::Gate(GateUpLayout::Interleaved) => (2 * rows, 0, 2),
            Rows::Up(GateUpLayout::Interleaved) => (2 * rows, 1, 2),
        };
        let place = Place { stack, stored_rows, cols, first_row, row_step };
        let parts = format.parts();
        let mut matrix = Self {
            name: tensor.name.clone(),
            format,
            parts,
            rows,
            cols,
            bytes: tensor.bytes,
            arrangement: Arrangement::Strided { offset: 0, row: 0, col: 0 },
            first_row,
            row_step,
            first_col: 0,
            scales: None,
            zeros: None,
            row_scales: RowScales::None,
            order: None,
        };
        if let Some(Blocks { rows: block_rows, cols: _, scale: _, act_order: _ }) = parts.blocks
            && block_rows > 1
            && (row_step != 1 || first_row % block_rows != 0)
        {
            return Err(Error::invalid(
                tensor.name.to_string(),
                format!("blocks of {block_rows} rows with {part:?}"),
                "parts that begin at a block",
                "store gate and up as tensors of their own",
            ));
        }
        let scaled = parts.blocks.is_some() || parts.row_scale;
        match stored {
            Stored::Plain(codes) if !scaled => matrix.plain(&place, codes, orientation)?,
            Stored::Plain(codes) => {
                return Err(Error::MissingTensor {
                    name: format!("{} (scales)", codes.name),
                    searched: "the layer's tensors".into(),
                    remedy: format!("{format:?} weights need their scales; fetch the shard that holds them").into(),
                });
            }
            Stored::Scaled { codes: _, scales } if !scaled => {
                return Err(Error::invalid(
                    scales.name.to_string(),
                    "scales",
                    format!("none beside {format:?} weights"),
                    "remove the scales or correct the format",
                ));
            }
            _ if orientation != Orientation::OutIn => {
                return Err(Error::invalid(
                    tensor.name.to_string(),
                    format!("{format:?} in {orientation:?}"),
                    "[out, in]",
                    "store quantised weights as [out, in]",
                ));
            }
            Stored::Scaled { codes, scales } => matrix.scaled(&place, codes, scales)?,
            Stored::Nvfp4 { codes, scales, global, divides } => {
                matrix.nvfp4(&place, codes, scales, global, divides)?;
            }
            Stored::PackQuantized { codes, scales, zeros, g_idx } => {
                matrix.pack_quantized(&place, codes, scales, zeros, g_idx)?;
            }
            Stored::Gptq { codes, scales, zeros, zeros_less_one, g_idx } => {
                matrix.gptq(&place, codes, scales, (zeros, zeros_less_one), g_idx)?;
            }
            Stored::Awq { codes, scales, zeros } => matrix.awq(&place, codes, scales, zeros)?,
            Stored::Gguf(codes) => matrix.gguf(&place, codes)?,
        }
        matrix.check_scales(stored)?;
        Ok(matrix)
    }

    /// Refuses a format that an arrangement of tensors cannot hold.
    fn expect_format(&self, holds: bool, what: &str) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(Error::invalid(
            self.name.to_string(),
            format!("{:?} stored as {what}", self.format),
            "tensors of the format's own kind",
            "correct the format",
        ))
    }

    fn plain(&mut self, place: &Place, codes: &Tensor<'a>, orientation: Orientation) -> Result<()> {
        let dtype = match self.parts.code {
            Code::F32 => Dtype::F32,
            Code::F16 => Dtype::F16,
            Code::Bf16 => Dtype::BF16,
            Code::E4m3 | Code::E2m1 | Code::Int8 | Code::Int4 | Code::Uint4 => {
                return self.expect_format(false, "values without scales");
            }
        };
        if codes.dtype != dtype {
            return Err(codes.wrong_dtype(codes.dtype, &format!("{dtype:?}")));
        }
        let (plane, row, col) = match orientation {
            Orientation::OutIn => ([place.stored_rows, place.cols], place.cols, 1),
            Orientation::InOut => ([place.cols, place.stored_rows], 1, place.stored_rows),
        };
        let offset = place.locate(codes, &plane, self.parts.code.bits() / 8)?;
        self.arrangement = Arrangement::Strided { offset, row, col };
        Ok(())
    }

    fn scaled(&mut self, place: &Place, codes: &Tensor<'a>, scales: &Tensor<'a>) -> Result<()> {
        let Place { stack: _, stored_rows, cols, first_row: _, row_step: _ } = *place;
        let dtypes: &[Dtype] = match self.format {
            WeightFormat::Fp8Block { block: _, scale: _ } | WeightFormat::Fp8Tensor | WeightFormat::Fp8Channel => {
                &[Dtype::F8_E4M3]
            }
            WeightFormat::Int8Channel => &[Dtype::I8],
            WeightFormat::Mxfp4 => &[Dtype::U8, Dtype::I8],
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Nvfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
            | WeightFormat::Q8_0
            | WeightFormat::Q4K
            | WeightFormat::Q6K => return self.expect_format(false, "codes and scales"),
        };
        if !dtypes.contains(&codes.dtype) {
            return Err(codes.wrong_dtype(codes.dtype, &format!("one of {dtypes:?}")));
        }
        let (offset, row) = match self.parts.code {
            Code::E2m1 => {
                let halves = self.even_cols(cols, 2)?;
                let blocks: [usize; 3] = [stored_rows, cols / 32, 16];
                let planes: &[&[usize]] = if cols.is_multiple_of(32) {
                    &[&[stored_rows, halves], &blocks]
                } else {
                    &[&[stored_rows, halves]]
                };
                (2 * place.locate_any(codes, planes, 1)?, cols)
            }
            Code::E4m3 | Code::Int8 | Code::Int4 | Code::Uint4 | Code::F32 | Code::F16 | Code::Bf16 => {
                (place.locate(codes, &[stored_rows, cols], 1)?, cols)
            }
        };
        self.arrangement = Arrangement::Strided { offset, row, col: 1 };
        match self.parts.blocks {
            Some(blocks) => self.scales = Some(block_scales(place, scales, blocks)?),
            None => self.row_scales = self.row_scales_of(place, scales)?,
        }
        Ok(())
    }

    /// `cols / per`, which must be whole.
    fn even_cols(&self, cols: usize, per: usize) -> Result<usize> {
        if cols.is_multiple_of(per) {
            return Ok(cols / per);
        }
        Err(Error::invalid(
            self.name.to_string(),
            format!("{cols} columns"),
            format!("a multiple of {per}, as codes share a unit of {per}"),
            "check hidden_size and intermediate_size in config.json",
        ))
    }

    fn row_scales_of(&self, place: &Place, scales: &Tensor<'a>) -> Result<RowScales> {
        let each = match self.format {
            WeightFormat::Fp8Channel | WeightFormat::Int8Channel => true,
            WeightFormat::Fp8Tensor
            | WeightFormat::Nvfp4
            | WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Fp8Block { block: _, scale: _ }
            | WeightFormat::Mxfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
            | WeightFormat::Q8_0
            | WeightFormat::Q4K
            | WeightFormat::Q6K => false,
        };
        let element = match scales.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => return Err(scales.wrong_dtype(other, "F32, BF16 or F16")),
        };
        let rows = place.stored_rows;
        let planes: &[&[usize]] = if each { &[&[rows, 1], &[rows]] } else { &[&[], &[1], &[1, 1]] };
        let first = place.locate_any(scales, planes, element)?;
        let all = scales.to_f32(scales.bytes.len() / element)?;
        if !each {
            return Ok(RowScales::One(all[first]));
        }
        let row = |row: usize| all[first + place.first_row + row * place.row_step];
        Ok(RowScales::Each((0..self.rows).map(row).collect()))
    }

    fn nvfp4(
        &mut self,
        place: &Place,
        codes: &Tensor<'a>,
        scales: &Tensor<'a>,
        global: &Tensor<'a>,
        divides: bool,
    ) -> Result<()> {
        self.expect_format(self.format == WeightFormat::Nvfp4, "NVFP4")?;
        if codes.dtype != Dtype::U8 {
            return Err(codes.wrong_dtype(codes.dtype, "U8"));
        }
        let halves = self.even_cols(place.cols, 2)?;
        let offset = 2 * place.locate(codes, &[place.stored_rows, halves], 1)?;
        self.arrangement = Arrangement::Strided { offset, row: place.cols, col: 1 };
        self.scales = self.parts.blocks.map(|blocks| block_scales(place, scales, blocks)).transpose()?;
        self.row_scales = match self.row_scales_of(place, global)? {
            RowScales::One(global) if divides => RowScales::One(1.0 / global),
            other => other,
        };
        Ok(())
    }

    /// What the three INT4 arrangements share.
    fn int4(
        &mut self,
        codes: &Tensor<'a>,
        zeros: Option<Zeros<'a>>,
        zeros_name: Option<&str>,
        g_idx: Option<&Tensor<'a>>,
    ) -> Result<()> {
        let (zero_points, act_order) = match self.format {
            WeightFormat::Int4 { group: _, scale: _, zero_points, act_order } => (zero_points, act_order),
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Fp8Block { block: _, scale: _ }
            | WeightFormat::Fp8Tensor
            | WeightFormat::Fp8Channel
            | WeightFormat::Int8Channel
            | WeightFormat::Mxfp4
            | WeightFormat::Nvfp4
            | WeightFormat::Q8_0
            | WeightFormat::Q4K
            | WeightFormat::Q6K => return self.expect_format(false, "INT4"),
        };
        if codes.dtype != Dtype::I32 {
            return Err(codes.wrong_dtype(codes.dtype, "I32"));
        }
        let blocks = self.blocks_per_row();
        let mismatch = |what: &str, found: bool| {
            let word = if found { "present" } else { "absent" };
            Error::invalid(format!("{what} of {}", codes.name), word, "as the format says", "correct the format")
        };
        match (zeros, zero_points) {
            (Some(zeros), true) => self.zeros = Some(zeros),
            (None, false) => {}
            // Symmetric weights may have zeros too, which then have to be the middle.
            (Some(zeros), false) => {
                let all = (0..self.rows).flat_map(|row| (0..blocks).map(move |block| (row, block)));
                let stored = |row: usize| self.first_row + row * self.row_step;
                if let Some(zero) = all.map(|(row, block)| zeros.get(stored(row), block)).find(|zero| *zero != 8) {
                    return Err(Error::invalid(
                        zeros_name.unwrap_or_default().to_owned(),
                        format!("zero point {zero}"),
                        "8 in symmetric weights",
                        "correct quantization_config (sym) or the checkpoint",
                    ));
                }
            }
            (None, true) => return Err(mismatch("zero points", false)),
        }
        match (g_idx, act_order) {
            (None, false) => {}
            (Some(tensor), true) => {
                expect_shape(tensor, &[self.cols], self.cols.checked_mul(4))?;
                let order = tensor.to_i32(self.cols)?;
                if let Some(group) = order.iter().find(|&&group| usize::try_from(group).map_or(true, |g| g >= blocks)) {
                    return Err(Error::invalid(
                        tensor.name.to_string(),
                        format!("group {group}"),
                        format!("groups in 0..{blocks}"),
                        "the checkpoint is damaged: download or convert it again",
                    ));
                }
                self.order = Some(order.into_iter().map(|group| group as u32).collect());
            }
            (found, _) => return Err(mismatch("g_idx", found.is_some())),
        }
        Ok(())
    }

    fn pack_quantized(
        &mut self,
        place: &Place,
        codes: &Tensor<'a>,
        scales: &Tensor<'a>,
        zeros: Option<&Tensor<'a>>,
        g_idx: Option<&Tensor<'a>>,
    ) -> Result<()> {
        let words = place.cols.div_ceil(8);
        let offset = 8 * place.locate(codes, &[place.stored_rows, words], 4)?;
        self.arrangement = Arrangement::Strided { offset, row: 8 * words, col: 1 };
        self.scales = self.parts.blocks.map(|blocks| block_scales(place, scales, blocks)).transpose()?;
        let blocks = self.blocks_per_row();
        let read = |tensor: &Tensor<'a>| -> Result<Zeros<'a>> {
            let offset = place.locate(tensor, &[place.stored_rows.div_ceil(8), blocks], 4)?;
            Ok(Zeros { bytes: tensor.bytes, along: ZerosAlong::Groups, offset, words: blocks, less_one: false })
        };
        self.int4(codes, zeros.map(read).transpose()?, zeros.map(|zeros| zeros.name.as_ref()), g_idx)
    }

    fn gptq(
        &mut self,
        place: &Place,
        codes: &Tensor<'a>,
        scales: &Tensor<'a>,
        (zeros, less_one): (&Tensor<'a>, bool),
        g_idx: Option<&Tensor<'a>>,
    ) -> Result<()> {
        let stored_rows = place.stored_rows;
        let words = self.even_cols(place.cols, 8)?;
        let offset = place.locate(codes, &[words, stored_rows], 4)?;
        self.arrangement = Arrangement::Gptq { offset, stored_rows };
        self.scales = Some(self.group_major_scales(place, scales)?);
        let zeros_read = self.group_major_zeros(place, zeros, ZerosAlong::Rows, less_one)?;
        self.int4(codes, Some(zeros_read), Some(&zeros.name), g_idx)
    }

    fn awq(&mut self, place: &Place, codes: &Tensor<'a>, scales: &Tensor<'a>, zeros: &Tensor<'a>) -> Result<()> {
        if !place.stored_rows.is_multiple_of(8) {
            let found = format!("{} rows", place.stored_rows);
            let remedy = "check hidden_size and intermediate_size in config.json";
            return Err(Error::invalid(codes.name.to_string(), found, "a multiple of 8", remedy));
        }
        let words = place.stored_rows / 8;
        let offset = place.locate(codes, &[place.cols, words], 4)?;
        self.arrangement = Arrangement::Awq { offset, words };
        self.scales = Some(self.group_major_scales(place, scales)?);
        let zeros_read = self.group_major_zeros(place, zeros, ZerosAlong::RowsAwq, false)?;
        self.int4(codes, Some(zeros_read), Some(&zeros.name), None)
    }

    /// [groups, out].
    fn group_major_scales(&self, place: &Place, scales: &Tensor<'a>) -> Result<Scales<'a>> {
        let element = scale_size(scales, self.parts.blocks.map_or(PackedScale::F32, |blocks| blocks.scale))?;
        let offset = place.locate(scales, &[self.blocks_per_row(), place.stored_rows], element)?;
        Ok(Scales { bytes: scales.bytes, element, offset, row: 1, col: place.stored_rows })
    }

    /// [groups, out / 8].
    fn group_major_zeros(
        &self,
        place: &Place,
        zeros: &Tensor<'a>,
        along: ZerosAlong,
        less_one: bool,
    ) -> Result<Zeros<'a>> {
        if zeros.dtype != Dtype::I32 {
            return Err(zeros.wrong_dtype(zeros.dtype, "I32"));
        }
        let words = place.stored_rows.div_ceil(8);
        let offset = place.locate(zeros, &[self.blocks_per_row(), words], 4)?;
        Ok(Zeros { bytes: zeros.bytes, along, offset, words, less_one })
    }

    fn gguf(&mut self, place: &Place, codes: &Tensor<'a>) -> Result<()> {
        let Some(block) = GgufBlock::of(self.format) else {
            return self.expect_format(false, "blocks of GGUF");
        };
        if codes.dtype != Dtype::U8 {
            return Err(codes.wrong_dtype(codes.dtype, "U8"));
        }
        let row = self.even_cols(place.cols, block.cols())? * block.bytes();
        let offset = place.locate(codes, &[place.stored_rows, row], 1)?;
        self.arrangement = Arrangement::Gguf { block, offset, row };
        Ok(())
    }

    /// Scales have to be finite, and positive but for the blocks that formats store as zeros.
    fn check_scales(&self, stored: Stored<'_, 'a>) -> Result<()> {
        let tensors: [Option<&Tensor<'a>>; 2] = match stored {
            Stored::Plain(_) => return Ok(()),
            Stored::Gguf(codes) => [Some(codes), None],
            Stored::Scaled { codes: _, scales }
            | Stored::PackQuantized { codes: _, scales, zeros: _, g_idx: _ }
            | Stored::Gptq { codes: _, scales, zeros: _, zeros_less_one: _, g_idx: _ }
            | Stored::Awq { codes: _, scales, zeros: _ } => [Some(scales), Some(scales)],
            Stored::Nvfp4 { codes: _, scales, global, divides: _ } => [Some(scales), Some(global)],
        };
        let name = |at: usize| tensors[at].map_or_else(String::new, |tensor| tensor.name.to_string());
        let (may_be_zero, may_be_negative) = match self.format {
            WeightFormat::Nvfp4 => (true, false),
            WeightFormat::Q8_0 | WeightFormat::Q4K | WeightFormat::Q6K => (true, true),
            WeightFormat::F32
            | WeightFormat::F16
            | WeightFormat::Bf16
            | WeightFormat::Fp8Block { block: _, scale: _ }
            | WeightFormat::Fp8Tensor
            | WeightFormat::Fp8Channel
            | WeightFormat::Int8Channel
            | WeightFormat::Mxfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ } => (false, false),
        };
        let refuse = |name: String, scale: f32| {
            let remedy = "the checkpoint is damaged: download or convert it again";
            Err(Error::invalid(name, format!("a scale of {scale}"), "finite positive scales", remedy))
        };
        if let Some(Blocks { rows: block_rows, cols: _, scale: _, act_order: _ }) = self.parts.blocks {
            for row in (0..self.rows).step_by(block_rows) {
                for block in 0..self.blocks_per_row() {
                    let [scale, min] = self.block_scale(row, block);
                    let legal = scale.is_finite()
                        && min.is_finite()
                        && (scale != 0.0 || may_be_zero)
                        && (scale >= 0.0 || may_be_negative)
                        && (may_be_negative || scale.is_sign_positive());
                    if !legal {
                        return refuse(name(0), scale);
                    }
                }
            }
        }
        let all: &[f32] = match &self.row_scales {
            RowScales::None => &[],
            RowScales::One(scale) => std::slice::from_ref(scale),
            RowScales::Each(scales) => scales,
        };
        match all.iter().find(|scale| !(scale.is_finite() && **scale > 0.0)) {
            Some(scale) => refuse(name(1), *scale),
            None => Ok(()),
        }
    }

    /// Name of the tensor.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Codes and scales.
    pub(crate) fn parts(&self) -> Parts {
        let rows = self.parts.cut_rows(self.first_row);
        if self.first_col == 0 { rows } else { rows.cut_cols(self.first_col).unwrap_or(rows) }
    }

    /// Type of the stored weights.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// [rows, cols].
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// A part of it: these rows and columns. Blocks keep their numbers and scales, wherever the part begins.
    ///
    /// # Errors
    /// A range that is empty or leaves the matrix.
    pub fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Self> {
        for (range, size) in [(&rows, self.rows), (&cols, self.cols)] {
            if range.is_empty() || range.end > size {
                let expected = format!("a part of 0..{size} of {:?}", self.shape());
                return Err(Error::invalid(self.name.to_string(), format!("{range:?}"), expected, "correct the shard"));
            }
        }
        let mut part = self.clone();
        part.first_row = self.stored_row(rows.start);
        part.first_col += cols.start;
        (part.rows, part.cols) = (rows.len(), cols.len());
        if let RowScales::Each(scales) = &self.row_scales {
            part.row_scales = RowScales::Each(scales[rows].to_vec());
        }
        Ok(part)
    }

    /// Scales of a row of blocks, before a part is taken; 0 without any.
    fn blocks_per_row(&self) -> usize {
        self.parts
            .blocks
            .map_or(0, |Blocks { rows: _, cols, scale: _, act_order: _ }| self.cols.div_ceil(cols.unwrap_or(self.cols)))
    }

    /// Which block of its stored row a column belongs to.
    pub fn block_of(&self, col: usize) -> usize {
        let col = self.first_col + col;
        match (&self.order, self.parts.blocks) {
            (Some(order), _) => order[col] as usize,
            (None, Some(Blocks { rows: _, cols: Some(cols), scale: _, act_order: _ })) => col / cols,
            (None, Some(Blocks { rows: _, cols: None, scale: _, act_order: _ }) | None) => 0,
        }
    }

    fn stored_row(&self, row: usize) -> usize {
        self.first_row + row * self.row_step
    }

    fn word(bytes: &[u8], word: usize) -> u32 {
        let at = 4 * word;
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    }

    fn half(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    }

    /// The bits of element (row, col) as the kernels keep them, in the low bits.
    pub fn code(&self, row: usize, col: usize) -> u32 {
        debug_assert!(row < self.rows && col < self.cols);
        let (bytes, stored, col) = (self.bytes, self.stored_row(row), self.first_col + col);
        match self.arrangement {
            Arrangement::Strided { offset, row, col: step } => {
                let index = offset + stored * row + col * step;
                match self.parts.code.bits() {
                    32 => Self::word(bytes, index),
                    16 => u32::from(Self::half(bytes, 2 * index)),
                    8 => u32::from(bytes[index]),
                    _ => u32::from(bytes[index / 2] >> (4 * (index % 2)) & 15),
                }
            }
            Arrangement::Gptq { offset, stored_rows } => {
                Self::word(bytes, offset + col / 8 * stored_rows + stored) >> (4 * (col % 8)) & 15
            }
            Arrangement::Awq { offset, words } => {
                Self::word(bytes, offset + col * words + stored / 8) >> (4 * AWQ_NIBBLE[stored % 8]) & 15
            }
            Arrangement::Gguf { block, offset, row } => {
                let bytes = &bytes[offset + stored * row + col / block.cols() * block.bytes()..][..block.bytes()];
                let col = col % block.cols();
                match block {
                    GgufBlock::Q8_0 => u32::from(bytes[2 + col]),
                    // A byte holds elements j and j + 16.
                    GgufBlock::Mxfp4 => u32::from(bytes[1 + col % 16] >> (4 * (col / 16)) & 15),
                    // Of each 64 columns, the first half are low nibbles, the second high ones.
                    GgufBlock::Q4K => u32::from(bytes[16 + col / 64 * 32 + col % 32] >> (4 * (col % 64 / 32)) & 15),
                    GgufBlock::Q6K => {
                        // Of each 128 columns: four low bits from two runs of 32 bytes, two high bits from one.
                        let (half, within) = (col / 128, col % 128);
                        let low = bytes[64 * half + within % 64] >> (4 * (within / 64)) & 15;
                        let high = bytes[128 + 32 * half + within % 32] >> (2 * (within / 32)) & 3;
                        u32::from((low | high << 4).wrapping_sub(32))
                    }
                }
            }
        }
    }

    /// The stored bits of a block's scale.
    pub(crate) fn scale_bits(&self, row: usize, block: usize) -> u32 {
        let stored = self.stored_row(row);
        match (self.arrangement, &self.scales) {
            (_, Some(scales)) => scales.bits(stored / self.parts.blocks.map_or(1, |blocks| blocks.rows), block),
            (Arrangement::Gguf { block: kind, offset, row }, None) => {
                let at = offset + stored * row + block * kind.bytes();
                match kind {
                    GgufBlock::Q8_0 => u32::from(Self::half(self.bytes, at)),
                    GgufBlock::Mxfp4 => u32::from(self.bytes[at]),
                    // Theirs are `super_block`s.
                    GgufBlock::Q4K | GgufBlock::Q6K => 0,
                }
            }
            (
                Arrangement::Strided { offset: _, row: _, col: _ }
                | Arrangement::Gptq { offset: _, stored_rows: _ }
                | Arrangement::Awq { offset: _, words: _ },
                None,
            ) => 0,
        }
    }

    /// A block's zero.
    pub(crate) fn zero(&self, row: usize, block: usize) -> u32 {
        self.zeros.as_ref().map_or(0, |zeros| zeros.get(self.stored_row(row), block))
    }

    /// The scales of eight (Q4_K) or sixteen (Q6_K) blocks as the kernels keep them; see [`PackedScale`].
    pub(crate) fn super_block(&self, row: usize, index: usize) -> [u32; 5] {
        let stored = self.stored_row(row);
        match self.arrangement {
            Arrangement::Gguf { block, offset, row } => {
                let bytes = &self.bytes[offset + stored * row + index * block.bytes()..][..block.bytes()];
                match block {
                    GgufBlock::Q4K => {
                        let mut words = [Self::word(bytes, 0), 0, 0, 0, 0];
                        for at in 0..8 {
                            let [sc, m] = q4_k_scale(&bytes[4..16], at);
                            words[1 + at / 2] |= (u32::from(sc) | u32::from(m) << 8) << (16 * (at % 2));
                        }
                        words
                    }
                    GgufBlock::Q6K => {
                        let word = |at| Self::word(&bytes[192..208], at);
                        [u32::from(Self::half(bytes, 208)), word(0), word(1), word(2), word(3)]
                    }
                    GgufBlock::Q8_0 | GgufBlock::Mxfp4 => [0; 5],
                }
            }
            Arrangement::Strided { offset: _, row: _, col: _ }
            | Arrangement::Gptq { offset: _, stored_rows: _ }
            | Arrangement::Awq { offset: _, words: _ } => [0; 5],
        }
    }

    /// A block's scale, and what is subtracted from each of its weights behind it.
    pub fn block_scale(&self, row: usize, block: usize) -> [f32; 2] {
        let Some(Blocks { rows: _, cols: _, scale, act_order: _ }) = self.parts.blocks else { return [1.0, 0.0] };
        let only = |scale: f32| [scale, 0.0];
        match scale {
            PackedScale::F32 => only(f32::from_bits(self.scale_bits(row, block))),
            PackedScale::F16 | PackedScale::F16Zero => only(numerics::decode_f16(self.scale_bits(row, block) as u16)),
            PackedScale::Bf16 | PackedScale::Bf16Zero => {
                only(numerics::decode_bf16(self.scale_bits(row, block) as u16))
            }
            PackedScale::E8m0 => only(numerics::decode_e8m0(self.scale_bits(row, block) as u8)),
            PackedScale::E4m3 => only(numerics::decode_e4m3(self.scale_bits(row, block) as u8)),
            PackedScale::Q4K => numerics::q4_k_scale(&self.super_block(row, block / 8), block % 8),
            PackedScale::Q6K => only(numerics::q6_k_scale(&self.super_block(row, block / 16), block % 16)),
        }
    }

    /// The scale of a whole row, behind those of its blocks; 1 where the format has none.
    pub fn row_scale(&self, row: usize) -> f32 {
        match &self.row_scales {
            RowScales::None => 1.0,
            RowScales::One(scale) => *scale,
            RowScales::Each(scales) => scales[row],
        }
    }

    /// The value of element (row, col) before any scale, its zero subtracted. Exact.
    pub fn code_value(&self, row: usize, col: usize) -> f32 {
        let code = numerics::decode(self.parts.code, self.code(row, col));
        if self.zeros.is_some() { code - self.zero(row, self.block_of(col)) as f32 } else { code }
    }

    /// The value of element (row, col): the exact code value, times its scales, each product rounded to f32.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        let value = self.code_value(row, col);
        if self.parts.blocks.is_none() && !self.parts.row_scale {
            return value;
        }
        let [scale, min] = self.block_scale(row, self.block_of(col));
        (value * scale - min) * self.row_scale(row)
    }
}

/// sc and m of one of eight blocks from ggml's twelve bytes.
fn q4_k_scale(packed: &[u8], at: usize) -> [u8; 2] {
    match at {
        0..4 => [packed[at] & 63, packed[at + 4] & 63],
        _ => [packed[at + 4] & 15 | (packed[at - 4] >> 6) << 4, packed[at + 4] >> 4 | (packed[at] >> 6) << 4],
    }
}

/// [out blocks, in blocks].
fn block_scales<'a>(place: &Place, scales: &Tensor<'a>, blocks: Blocks) -> Result<Scales<'a>> {
    let Blocks { rows, cols, scale, act_order: _ } = blocks;
    let element = scale_size(scales, scale)?;
    let plane = [place.stored_rows.div_ceil(rows), place.cols.div_ceil(cols.unwrap_or(place.cols))];
    let offset = place.locate(scales, &plane, element)?;
    Ok(Scales { bytes: scales.bytes, element, offset, row: plane[1], col: 1 })
}

/// Bytes of a stored scale, its dtype checked.
fn scale_size(scales: &Tensor<'_>, scale: PackedScale) -> Result<usize> {
    let (dtypes, element): (&[Dtype], usize) = match scale {
        PackedScale::F32 => (&[Dtype::F32], 4),
        PackedScale::F16 | PackedScale::F16Zero => (&[Dtype::F16], 2),
        PackedScale::Bf16 | PackedScale::Bf16Zero => (&[Dtype::BF16], 2),
        PackedScale::E8m0 => (&[Dtype::F8_E8M0, Dtype::U8], 1),
        PackedScale::E4m3 => (&[Dtype::F8_E4M3], 1),
        PackedScale::Q4K | PackedScale::Q6K => (&[], 0),
    };
    if !dtypes.contains(&scales.dtype) {
        return Err(scales.wrong_dtype(scales.dtype, &format!("one of {dtypes:?}")));
    }
    Ok(element)
}

impl Scales<'_> {
    fn bits(&self, row: usize, block: usize) -> u32 {
        let at = (self.offset + row * self.row + block * self.col) * self.element;
        self.bytes[at..at + self.element].iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte))
    }
}

impl Zeros<'_> {
    fn get(&self, row: usize, block: usize) -> u32 {
        let (word, nibble) = match self.along {
            ZerosAlong::Groups => (row / 8 * self.words + block, row % 8),
            ZerosAlong::Rows => (block * self.words + row / 8, row % 8),
            ZerosAlong::RowsAwq => (block * self.words + row / 8, AWQ_NIBBLE[row % 8] as usize),
        };
        (Matrix::word(self.bytes, self.offset + word) >> (4 * nibble) & 15) + u32::from(self.less_one)
    }
}
