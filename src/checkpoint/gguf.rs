//! The header of a GGUF file (llama.cpp's format), versions 2 and 3, little-endian. Nothing in it is believed
//! before the bytes that it claims are there.

use std::collections::BTreeSet;
use std::path::Path;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::spec::WeightFormat;
use crate::weights::GgufBlock;

const DAMAGED: &str = "the file is cut off or damaged: download or convert it again";
/// ggml's own limit.
const MAX_DIMENSIONS: u32 = 4;
/// Arrays in arrays; llama.cpp writes none.
const MAX_NESTING: usize = 4;
/// Where tensors begin if the file does not say it.
const ALIGNMENT: u64 = 32;
// Types of metadata.
const TYPE_U8: u32 = 0;
const TYPE_U16: u32 = 2;
const TYPE_U32: u32 = 4;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;
const TYPE_U64: u32 = 10;

/// What a file says about itself.
pub(super) struct Header {
    /// Files of the whole model, where it is split.
    pub(super) split_count: Option<usize>,
    pub(super) tensors: Vec<Info>,
}

/// One tensor.
pub(super) struct Info {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// From the start of the file.
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) blocks: Option<Blocks>,
}

/// What U8 elements hold that are no numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blocks {
    /// Rows of blocks.
    Of(WeightFormat),
    /// A type of ggml that nothing here reads.
    Unread(u32),
}

/// How a type of ggml lies in a file.
enum Kind {
    Plain(Dtype),
    Blocks(GgufBlock),
    Unread,
}

impl Kind {
    fn of(ggml_type: u32) -> Self {
        match ggml_type {
            0 => Self::Plain(Dtype::F32),
            1 => Self::Plain(Dtype::F16),
            8 => Self::Blocks(GgufBlock::Q8_0),
            12 => Self::Blocks(GgufBlock::Q4K),
            14 => Self::Blocks(GgufBlock::Q6K),
            24 => Self::Plain(Dtype::I8),
            25 => Self::Plain(Dtype::I16),
            26 => Self::Plain(Dtype::I32),
            27 => Self::Plain(Dtype::I64),
            28 => Self::Plain(Dtype::F64),
            30 => Self::Plain(Dtype::BF16),
            39 => Self::Blocks(GgufBlock::Mxfp4),
            _ => Self::Unread,
        }
    }
}

/// A type of ggml in messages.
pub(super) fn type_name(ggml_type: u32) -> String {
    let name = match ggml_type {
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        41 => "Q1_0",
        _ => return format!("ggml's type {ggml_type}"),
    };
    format!("{name} (ggml's type {ggml_type})")
}

/// A tensor as the file lists it.
struct Listed {
    name: String,
    /// Innermost first.
    sizes: Vec<u64>,
    ggml_type: u32,
    /// From the first tensor's first byte.
    offset: u64,
}

/// What a tensor's type and sizes mean.
struct Layout {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: u64,
    blocks: Option<Blocks>,
}

/// Reads the header, and proves that every tensor's bytes are in `data`.
pub(super) fn read(path: &Path, data: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { path, rest: data };
    let magic = cursor.take(4, "magic")?;
    if magic != b"GGUF" {
        let found = format!("{magic:?}");
        return Err(cursor.invalid("magic", found, "the bytes GGUF", "give a GGUF file"));
    }
    match cursor.u32("version")? {
        2 | 3 => {}
        big if big & 0xffff == 0 => {
            let remedy = "convert the file to little-endian";
            return Err(cursor.invalid("version", format!("{big}, a big-endian file"), "2 or 3", remedy));
        }
        other => return Err(cursor.invalid("version", other, "2 or 3", "convert the model with a current llama.cpp")),
    }
    let tensors = cursor.u64("number of tensors")?;
    let keys = cursor.u64("number of keys")?;
    let (alignment, split_count) = metadata(&mut cursor, keys)?;
    let mut listed = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..tensors {
        let tensor = cursor.tensor()?;
        if !names.insert(tensor.name.clone()) {
            return Err(cursor.twice(&tensor.name));
        }
        listed.push(tensor);
    }
    let first = align((data.len() - cursor.rest.len()) as u64, alignment);
    // A file of metadata only may end without padding.
    let size = (data.len() as u64).saturating_sub(first);
    let infos = place(&cursor, &listed, alignment, first, size)?;
    Ok(Header { split_count, tensors: infos })
}

/// The alignment of tensors and the number of files: the only keys that concern the bytes.
fn metadata(cursor: &mut Cursor<'_>, count: u64) -> Result<(u64, Option<usize>)> {
    let (mut alignment, mut split_count) = (ALIGNMENT, None);
    let mut keys = BTreeSet::new();
    for _ in 0..count {
        let key = cursor.text("key")?;
        if !keys.insert(key) {
            return Err(cursor.twice(key));
        }
        let kind = cursor.u32(key)?;
        match key {
            "general.alignment" => {
                alignment = cursor.unsigned(key, kind)?;
                if !alignment.is_power_of_two() || alignment > 1 << 20 {
                    return Err(cursor.invalid(key, alignment, "a power of two up to 2^20", DAMAGED));
                }
            }
            "split.count" => {
                let count = u16::try_from(cursor.unsigned(key, kind)?)
                    .map_err(|_| cursor.invalid(key, "more than 65535", "a number of files", DAMAGED))?;
                // A model that was split and merged again says 0.
                split_count = (count > 0).then_some(count.into());
            }
            _ => cursor.skip(key, kind, 0)?,
        }
    }
    Ok((alignment, split_count))
}

/// Where each tensor lies. Tensors follow each other in the order of the list, as ggml has it.
fn place(cursor: &Cursor<'_>, listed: &[Listed], alignment: u64, first: u64, size: u64) -> Result<Vec<Info>> {
    let mut infos = Vec::new();
    // Where the last tensor ends; unknown if its type is.
    let mut expected = Some(0);
    let mut least = 0;
    for (at, tensor) in listed.iter().enumerate() {
        let Listed { name, sizes, ggml_type, offset } = tensor;
        let misplaced = |expected: String| cursor.invalid(&format!("{name}.offset"), *offset, expected, DAMAGED);
        if expected.is_some_and(|expected| expected != *offset) {
            return Err(misplaced(format!("{least}, where the tensor before it ends")));
        }
        if *offset < least || *offset > size || !offset.is_multiple_of(alignment) {
            return Err(misplaced(format!("a multiple of {alignment} from {least} to {size}")));
        }
        let Layout { dtype, shape, bytes, blocks } = match cursor.layout(tensor)? {
            Some(layout) => layout,
            // Up to the next one. Nobody can read it; whoever asks for its format learns its type.
            None => {
                let end = listed.get(at + 1).map_or(size, |next| next.offset);
                let bytes = end.checked_sub(*offset).ok_or_else(|| misplaced(format!("at most {end}")))?;
                let blocks = Some(Blocks::Unread(*ggml_type));
                Layout { dtype: Dtype::U8, shape: vec![in_memory(bytes)?], bytes, blocks }
            }
        };
        let end = offset.checked_add(bytes).filter(|end| *end <= size).ok_or_else(|| {
            let found = format!("{bytes} bytes (ggml's sizes {sizes:?}) from {offset} on");
            cursor.invalid(name, found, format!("at most {size} bytes of tensors"), DAMAGED)
        })?;
        expected = match blocks {
            Some(Blocks::Unread(_)) => None,
            Some(Blocks::Of(_)) | None => Some(align(end, alignment)),
        };
        least = align(end, alignment);
        let (start, end) = (in_memory(first + offset)?, in_memory(first + end)?);
        infos.push(Info { name: name.clone(), dtype, shape, start, end, blocks });
    }
    if size > least && expected.is_some() {
        let found = format!("{size} bytes of tensors");
        return Err(cursor.invalid("size", found, format!("{least}, as the header says"), DAMAGED));
    }
    Ok(infos)
}

/// The next multiple. Places in a file are far from overflow.
fn align(at: u64, alignment: u64) -> u64 {
    at.saturating_add(alignment - 1) / alignment * alignment
}

/// A size that bytes in memory have.
fn in_memory(size: u64) -> Result<usize> {
    let remedy = "read the file on a 64-bit machine";
    usize::try_from(size).map_err(|_| Error::invalid("size", size, "a size that fits this machine", remedy))
}

/// Bytes that were not read yet.
struct Cursor<'a> {
    path: &'a Path,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn invalid(
        &self,
        field: &str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
        remedy: &'static str,
    ) -> Error {
        Error::invalid(format!("{}: {field}", self.path.display()), found, expected, remedy)
    }

    fn twice(&self, name: &str) -> Error {
        self.invalid(name, "the name twice in one file", "each name once", DAMAGED)
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        let split = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let Some((taken, rest)) = split else {
            let found = format!("{} bytes to the end of the file", self.rest.len());
            return Err(self.invalid(what, found, format!("{count} more"), DAMAGED));
        };
        self.rest = rest;
        Ok(taken)
    }

    /// A little-endian number of so many bytes.
    fn number(&mut self, bytes: u64, what: &str) -> Result<u64> {
        Ok(self.take(bytes, what)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        // Four bytes fit.
        Ok(self.number(4, what)? as u32)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.number(8, what)
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8]> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    /// A string that has to be UTF-8, as names are.
    fn text(&mut self, what: &str) -> Result<&'a str> {
        let bytes = self.string(what)?;
        std::str::from_utf8(bytes).map_err(|error| self.invalid(what, error, "UTF-8", DAMAGED))
    }

    /// A value that has to be an unsigned integer.
    fn unsigned(&mut self, key: &str, kind: u32) -> Result<u64> {
        match kind {
            TYPE_U8 => self.number(1, key),
            TYPE_U16 => self.number(2, key),
            TYPE_U32 => self.number(4, key),
            TYPE_U64 => self.number(8, key),
            other => Err(self.invalid(key, format!("a value of type {other}"), "an unsigned integer", DAMAGED)),
        }
    }

    fn skip(&mut self, key: &str, kind: u32, nesting: usize) -> Result<()> {
        if let Some(size) = value_size(kind) {
            return self.take(size, key).map(|_| ());
        }
        match kind {
            TYPE_STRING => self.string(key).map(|_| ()),
            TYPE_ARRAY if nesting < MAX_NESTING => {
                let (element, count) = (self.u32(key)?, self.u64(key)?);
                match value_size(element) {
                    // A product beyond 64 bits is beyond the file as well.
                    Some(size) => self.take(size.saturating_mul(count), key).map(|_| ()),
                    None => (0..count).try_for_each(|_| self.skip(key, element, nesting + 1)),
                }
            }
            TYPE_ARRAY => Err(self.invalid(key, "arrays in arrays", format!("at most {MAX_NESTING} deep"), DAMAGED)),
            other => Err(self.invalid(key, format!("a value of type {other}"), "types 0 to 12", DAMAGED)),
        }
    }

    fn tensor(&mut self) -> Result<Listed> {
        let name = self.text("tensor name")?.to_owned();
        let count = self.u32(&name)?;
        if count > MAX_DIMENSIONS {
            return Err(self.invalid(&name, format!("{count} dimensions"), format!("up to {MAX_DIMENSIONS}"), DAMAGED));
        }
        let sizes = (0..count).map(|_| self.u64(&name)).collect::<Result<Vec<_>>>()?;
        if sizes.contains(&0) {
            return Err(self.invalid(&name, format!("ggml's sizes {sizes:?}"), "sizes of at least 1", DAMAGED));
        }
        let (ggml_type, offset) = (self.u32(&name)?, self.u64(&name)?);
        Ok(Listed { name, sizes, ggml_type, offset })
    }

    /// `None` if nothing here reads the type.
    fn layout(&self, tensor: &Listed) -> Result<Option<Layout>> {
        let Listed { name, sizes, ggml_type, offset: _ } = tensor;
        let wrong = |expected: &str| self.invalid(name, format!("ggml's sizes {sizes:?}"), expected, DAMAGED);
        let mut sizes = sizes.clone();
        let (dtype, element, blocks) = match Kind::of(*ggml_type) {
            Kind::Unread => return Ok(None),
            Kind::Plain(dtype) => (dtype, dtype.bitsize() / 8, None),
            Kind::Blocks(block) => {
                let (elements, bytes) = (block.cols() as u64, block.bytes() as u64);
                let expected = format!("rows of whole blocks, {elements} elements each");
                let row = sizes.first_mut().ok_or_else(|| wrong(&expected))?;
                let whole = row.is_multiple_of(elements).then_some(*row / elements);
                *row = whole.and_then(|count| count.checked_mul(bytes)).ok_or_else(|| wrong(&expected))?;
                (Dtype::U8, 1, Some(Blocks::Of(block.format())))
            }
        };
        let bytes = sizes.iter().try_fold(element as u64, |bytes, size| bytes.checked_mul(*size));
        let bytes = bytes.ok_or_else(|| wrong("a product that fits 64 bits"))?;
        let shape = sizes.iter().rev().map(|size| in_memory(*size)).collect::<Result<_>>()?;
        Ok(Some(Layout { dtype, shape, bytes, blocks }))
    }
}

/// Bytes of a value of metadata that is no string and no array.
fn value_size(kind: u32) -> Option<u64> {
    match kind {
        // u8, i8, bool
        0 | 1 | 7 => Some(1),
        // u16, i16
        2 | 3 => Some(2),
        // u32, i32, f32
        4..=6 => Some(4),
        // u64, i64, f64
        10..=12 => Some(8),
        _ => None,
    }
}
