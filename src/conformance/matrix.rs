//! Random matrices in every form that a checkpoint may have them in.

use fastrand::Rng;

use crate::error::{Error, Result};
use crate::spec::{GateUpLayout, Orientation, ScaleFormat, WeightFormat};
use crate::weights::{Dtype, Matrix, Rows, Stored, Tensor};

/// A stream of random numbers for each tensor, by its name: a tensor more or less changes no other one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams(pub u64);

impl Streams {
    pub(super) fn of(self, name: &str) -> Rng {
        // FNV-1a.
        let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Rng::with_seed(name.bytes().fold(self.0 ^ 0xcbf2_9ce4_8422_2325, hash))
    }
}

/// A random number from N(0, 1).
pub(super) fn normal(rng: &mut Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
    (radius * (rng.f64() * std::f64::consts::TAU).cos()) as f32
}

/// A tensor with its bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedTensor {
    /// Type of an element.
    pub dtype: Dtype,
    /// Sizes.
    pub shape: Vec<usize>,
    /// Elements, little endian.
    pub bytes: Vec<u8>,
}

impl OwnedTensor {
    fn view(&self) -> Tensor<'_> {
        Tensor { name: "random".into(), dtype: self.dtype, shape: self.shape.clone(), bytes: &self.bytes }
    }
}

/// A matrix in its checkpoint form.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedMatrix {
    codes: OwnedTensor,
    beside: Beside,
    format: WeightFormat,
    shape: [usize; 2],
}

/// The tensors beside the codes, which say how these are arranged.
#[derive(Debug, Clone, PartialEq)]
enum Beside {
    Nothing,
    Scales(OwnedTensor),
    Nvfp4 { scales: OwnedTensor, global: OwnedTensor, divides: bool },
    PackQuantized { scales: OwnedTensor, zeros: Option<OwnedTensor>, g_idx: Option<OwnedTensor> },
    Gptq { scales: OwnedTensor, zeros: OwnedTensor, less_one: bool, g_idx: Option<OwnedTensor> },
    Awq { scales: OwnedTensor, zeros: OwnedTensor },
    Gguf,
}

/// Whether a matrix of so many columns can have this format.
pub fn fits(format: WeightFormat, cols: usize) -> bool {
    match format {
        WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => cols.is_multiple_of(2),
        WeightFormat::Q8_0 => cols.is_multiple_of(32),
        WeightFormat::Q4K | WeightFormat::Q6K => cols.is_multiple_of(256),
        WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::Bf16
        | WeightFormat::Fp8Block { block: _, scale: _ }
        | WeightFormat::Fp8Tensor
        | WeightFormat::Fp8Channel
        | WeightFormat::Int8Channel
        | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ } => true,
    }
}

/// Random words whose nibbles are `legal`.
fn nibbles(rng: &mut Rng, words: usize, legal: std::ops::Range<u32>) -> Vec<u8> {
    let word = |rng: &mut Rng| (0..8).fold(0, |word, at| word | rng.u32(legal.clone()) << (4 * at));
    (0..words).flat_map(|_| word(rng).to_le_bytes()).collect()
}

/// Random positive scales about `size`.
fn scales(rng: &mut Rng, format: ScaleFormat, size: f32, shape: Vec<usize>) -> OwnedTensor {
    let count: usize = shape.iter().product();
    let one = |rng: &mut Rng| size * (0.5 + rng.f32());
    let (dtype, bytes): (_, Vec<u8>) = match format {
        ScaleFormat::F32 => (Dtype::F32, (0..count).flat_map(|_| one(rng).to_le_bytes()).collect()),
        ScaleFormat::F16 => {
            (Dtype::F16, (0..count).flat_map(|_| half::f16::from_f32(one(rng)).to_le_bytes()).collect())
        }
        ScaleFormat::Bf16 => {
            (Dtype::BF16, (0..count).flat_map(|_| half::bf16::from_f32(one(rng)).to_le_bytes()).collect())
        }
        ScaleFormat::E8m0 => {
            let power = (size.log2() + 127.0) as u8;
            (Dtype::F8_E8M0, (0..count).map(|_| rng.u8(power - 1..power + 2)).collect())
        }
    };
    OwnedTensor { dtype, shape, bytes }
}

impl OwnedMatrix {
    /// Codes alone, or with block scales.
    pub(super) fn of(codes: OwnedTensor, scales: Option<OwnedTensor>, format: WeightFormat, shape: [usize; 2]) -> Self {
        Self { codes, beside: scales.map_or(Beside::Nothing, Beside::Scales), format, shape }
    }

    /// Random weights [rows, cols] that keep the size of what they multiply.
    ///
    /// # Errors
    /// A format that rows of so many columns cannot have.
    pub fn random(rng: &mut Rng, format: WeightFormat, [rows, cols]: [usize; 2]) -> Result<Self> {
        if !fits(format, cols) {
            let expected = "whole bytes and blocks in a row";
            return Err(Error::invalid("format", format!("{format:?}, {cols} columns"), expected, "change either"));
        }
        let spread = 1.0 / (cols as f32).sqrt();
        let count = rows * cols;
        let whole = vec![rows, cols];
        // Any E4M3 code but NaN; those reach 448, INT8 127, E2M1 6, INT4 8.
        let e4m3 = |rng: &mut Rng, count: usize| -> Vec<u8> {
            (0..count).map(|_| rng.u8(0..0x7f) | if rng.bool() { 0x80 } else { 0 }).collect()
        };
        let bytes = |rng: &mut Rng, count: usize| -> Vec<u8> { (0..count).map(|_| rng.u8(..)).collect() };
        let owned = |dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>| OwnedTensor { dtype, shape, bytes };
        let (codes, beside) = match format {
            WeightFormat::F32 => {
                let bytes = (0..count).flat_map(|_| (normal(rng) * spread).to_le_bytes()).collect();
                (owned(Dtype::F32, whole, bytes), Beside::Nothing)
            }
            WeightFormat::F16 => {
                let bytes = (0..count).flat_map(|_| half::f16::from_f32(normal(rng) * spread).to_le_bytes()).collect();
                (owned(Dtype::F16, whole, bytes), Beside::Nothing)
            }
            WeightFormat::Bf16 => {
                let bytes = (0..count).flat_map(|_| half::bf16::from_f32(normal(rng) * spread).to_le_bytes()).collect();
                (owned(Dtype::BF16, whole, bytes), Beside::Nothing)
            }
            WeightFormat::Fp8Block { block, scale } => {
                let shape = vec![rows.div_ceil(block[0]), cols.div_ceil(block[1])];
                let beside = Beside::Scales(scales(rng, scale, spread / 64.0, shape));
                (owned(Dtype::F8_E4M3, whole, e4m3(rng, count)), beside)
            }
            WeightFormat::Fp8Tensor => {
                let beside = Beside::Scales(scales(rng, ScaleFormat::F32, spread / 64.0, vec![]));
                (owned(Dtype::F8_E4M3, whole, e4m3(rng, count)), beside)
            }
            WeightFormat::Fp8Channel => {
                let beside = Beside::Scales(scales(rng, ScaleFormat::F32, spread / 64.0, vec![rows, 1]));
                (owned(Dtype::F8_E4M3, whole, e4m3(rng, count)), beside)
            }
            WeightFormat::Int8Channel => {
                let beside = Beside::Scales(scales(rng, ScaleFormat::Bf16, spread / 64.0, vec![rows, 1]));
                (owned(Dtype::I8, whole, bytes(rng, count)), beside)
            }
            WeightFormat::Mxfp4 => {
                let shape = vec![rows, cols.div_ceil(32)];
                let beside = Beside::Scales(scales(rng, ScaleFormat::E8m0, spread / 3.0, shape));
                (owned(Dtype::I8, vec![rows, cols / 2], bytes(rng, count / 2)), beside)
            }
            WeightFormat::Nvfp4 => {
                let shape = vec![rows, cols.div_ceil(16)];
                let blocks = shape[0] * shape[1];
                // A block in ten is all zeros.
                let scale = |rng: &mut Rng| if rng.u8(0..10) == 0 { 0 } else { rng.u8(0x60..0x7f) };
                let scales = owned(Dtype::F8_E4M3, shape, (0..blocks).map(|_| scale(rng)).collect());
                let divides = rng.bool();
                let global = spread / 400.0 * (0.5 + rng.f32());
                let global = if divides { 1.0 / global } else { global };
                let global = owned(Dtype::F32, vec![], global.to_le_bytes().to_vec());
                (
                    owned(Dtype::U8, vec![rows, cols / 2], bytes(rng, count / 2)),
                    Beside::Nvfp4 { scales, global, divides },
                )
            }
            WeightFormat::Int4 { group, scale, zero_points, act_order } => {
                let groups = group.map_or(1, |group| cols.div_ceil(group));
                let order = |rng: &mut Rng| {
                    let bytes = (0..cols).flat_map(|_| rng.u32(0..groups as u32).to_le_bytes()).collect();
                    act_order.then(|| owned(Dtype::I32, vec![cols], bytes))
                };
                let less_one = rng.bool();
                let legal = match (zero_points, less_one) {
                    (true, _) => 0..16,
                    (false, true) => 7..8,
                    (false, false) => 8..9,
                };
                let size = spread / 4.0;
                match rng.u8(0..3) {
                    0 if cols.is_multiple_of(8) => {
                        let codes = owned(Dtype::I32, vec![cols / 8, rows], nibbles(rng, count / 8, 0..16));
                        let words = rows.div_ceil(8);
                        let zeros = owned(Dtype::I32, vec![groups, words], nibbles(rng, groups * words, legal));
                        let scales = scales(rng, scale, size, vec![groups, rows]);
                        (codes, Beside::Gptq { scales, zeros, less_one, g_idx: order(rng) })
                    }
                    1 if rows.is_multiple_of(8) && !act_order => {
                        let legal = if zero_points { 0..16 } else { 8..9 };
                        let codes = owned(Dtype::I32, vec![cols, rows / 8], nibbles(rng, count / 8, 0..16));
                        let zeros = owned(Dtype::I32, vec![groups, rows / 8], nibbles(rng, groups * rows / 8, legal));
                        (codes, Beside::Awq { scales: scales(rng, scale, size, vec![groups, rows]), zeros })
                    }
                    _ => {
                        let words = cols.div_ceil(8);
                        let codes = owned(Dtype::I32, vec![rows, words], nibbles(rng, rows * words, 0..16));
                        let scales = scales(rng, scale, size, vec![rows, groups]);
                        let words = rows.div_ceil(8);
                        let zeros = zero_points
                            .then(|| owned(Dtype::I32, vec![words, groups], nibbles(rng, words * groups, 0..16)));
                        (codes, Beside::PackQuantized { scales, zeros, g_idx: order(rng) })
                    }
                }
            }
            WeightFormat::Q8_0 => {
                let mut data = bytes(rng, count / 32 * 34);
                for block in data.chunks_exact_mut(34) {
                    block[..2].copy_from_slice(&half::f16::from_f32(spread / 64.0 * (rng.f32() - 0.5)).to_le_bytes());
                }
                (owned(Dtype::U8, vec![rows, cols / 32 * 34], data), Beside::Gguf)
            }
            WeightFormat::Q4K => {
                let mut data = bytes(rng, count / 256 * 144);
                for block in data.chunks_exact_mut(144) {
                    for at in [0, 2] {
                        let d = half::f16::from_f32(spread / 256.0 * rng.f32());
                        block[at..at + 2].copy_from_slice(&d.to_le_bytes());
                    }
                }
                (owned(Dtype::U8, vec![rows, cols / 256 * 144], data), Beside::Gguf)
            }
            WeightFormat::Q6K => {
                let mut data = bytes(rng, count / 256 * 210);
                for block in data.chunks_exact_mut(210) {
                    let d = half::f16::from_f32(spread / 2000.0 * (rng.f32() - 0.5));
                    block[208..].copy_from_slice(&d.to_le_bytes());
                }
                (owned(Dtype::U8, vec![rows, cols / 256 * 210], data), Beside::Gguf)
            }
        };
        Ok(Self { codes, beside, format, shape: [rows, cols] })
    }

    /// The matrix as a checkpoint's.
    ///
    /// # Errors
    /// Tensors that are not what format and shape imply.
    pub fn view(&self) -> Result<Matrix<'_>> {
        self.read(Orientation::OutIn, Rows::All, self.shape)
    }

    /// The matrix that a reader finds who takes the tensors to be stored so, whether they are or not.
    ///
    /// # Errors
    /// Tensors that are not what this implies.
    pub(super) fn read(&self, orientation: Orientation, rows: Rows, shape: [usize; 2]) -> Result<Matrix<'_>> {
        let codes = &self.codes.view();
        let tensor = OwnedTensor::view;
        let matrix = |stored| Matrix::view(stored, self.format, orientation, rows, None, shape);
        match &self.beside {
            Beside::Nothing => matrix(Stored::Plain(codes)),
            Beside::Scales(scales) => matrix(Stored::Scaled { codes, scales: &tensor(scales) }),
            Beside::Nvfp4 { scales, global, divides } => {
                let (scales, global) = (&tensor(scales), &tensor(global));
                matrix(Stored::Nvfp4 { codes, scales, global, divides: *divides })
            }
            Beside::PackQuantized { scales, zeros, g_idx } => {
                let (zeros, g_idx) = (zeros.as_ref().map(tensor), g_idx.as_ref().map(tensor));
                let (zeros, g_idx) = (zeros.as_ref(), g_idx.as_ref());
                matrix(Stored::PackQuantized { codes, scales: &tensor(scales), zeros, g_idx })
            }
            Beside::Gptq { scales, zeros, less_one, g_idx } => {
                let g_idx = g_idx.as_ref().map(tensor);
                let (scales, zeros) = (&tensor(scales), &tensor(zeros));
                matrix(Stored::Gptq { codes, scales, zeros, zeros_less_one: *less_one, g_idx: g_idx.as_ref() })
            }
            Beside::Awq { scales, zeros } => {
                matrix(Stored::Awq { codes, scales: &tensor(scales), zeros: &tensor(zeros) })
            }
            Beside::Gguf => matrix(Stored::Gguf(codes)),
        }
    }

    /// Gate and up in one tensor.
    ///
    /// # Errors
    /// Matrices with scales, which are stored apart.
    pub(super) fn fused(gate: &Self, up: &Self, layout: GateUpLayout) -> Result<Self> {
        let row_bytes = gate.shape[1] * gate.plain()?;
        let (gates, ups) = (gate.codes.bytes.chunks(row_bytes), up.codes.bytes.chunks(row_bytes));
        let bytes: Vec<u8> = match layout {
            GateUpLayout::Separate | GateUpLayout::Halves => gates.chain(ups).flatten().copied().collect(),
            GateUpLayout::Interleaved => gates.zip(ups).flat_map(|(gate, up)| [gate, up]).flatten().copied().collect(),
        };
        let shape = [2 * gate.shape[0], gate.shape[1]];
        let codes = OwnedTensor { dtype: gate.codes.dtype, shape: shape.to_vec(), bytes };
        Ok(Self { codes, beside: Beside::Nothing, format: gate.format, shape })
    }

    /// The same matrix, stored in the other orientation.
    ///
    /// # Errors
    /// A matrix with scales, which is stored one way only.
    pub(super) fn transposed(&self) -> Result<Self> {
        let size = self.plain()?;
        let [rows, cols] = self.shape;
        let element = |(col, row): (usize, usize)| &self.codes.bytes[(row * cols + col) * size..][..size];
        let elements = (0..cols).flat_map(|col| (0..rows).map(move |row| (col, row)));
        let bytes = elements.flat_map(element).copied().collect();
        let codes = OwnedTensor { dtype: self.codes.dtype, shape: vec![cols, rows], bytes };
        Ok(Self { codes, beside: Beside::Nothing, ..self.clone() })
    }

    /// Whether it is one tensor of numbers.
    pub(super) fn is_plain(&self) -> bool {
        self.plain().is_ok()
    }

    /// Bytes of an element of a matrix that is one tensor of numbers.
    fn plain(&self) -> Result<usize> {
        match (&self.beside, self.codes.dtype) {
            (Beside::Nothing, Dtype::F32) => Ok(4),
            (Beside::Nothing, Dtype::F16 | Dtype::BF16) => Ok(2),
            (_, dtype) => {
                let remedy = "give the layer another format or the usual layout";
                Err(Error::invalid("format", format!("{:?} in {dtype:?}", self.format), "floats", remedy))
            }
        }
    }

    /// Writes NaN into its first weight; `false` if it is not of F32.
    pub(super) fn spoil(&mut self) -> bool {
        let first = match self.codes.dtype {
            Dtype::F32 => self.codes.bytes.first_chunk_mut(),
            _ => None,
        };
        first.map(|bytes| *bytes = f32::NAN.to_le_bytes()).is_some()
    }
}
