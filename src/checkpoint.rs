//! A model's `config.json` and the tensors of its safetensors shards or GGUF files, memory-mapped.
//!
//! Shards of other layers may be absent: what is there is checked completely, what is not is missed
//! only by whoever asks for one of its tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use memmap2::{Mmap, MmapOptions};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::{Map, Value};

use crate::error::{Error, Result, Unsupported};
use crate::spec::WeightFormat;
use crate::weights::Tensor;

mod gguf;
mod json;

/// Bytes before the header: its length, little-endian.
const LENGTH_BYTES: usize = 8;
/// Inputs and expected outputs of a golden case. Not weights.
const NOT_WEIGHTS: &str = "io.safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";
const GGUF_SUFFIX: &str = ".gguf";

/// `config.json` and the tensors of all shards that are present.
///
/// Files are mapped read-only and must not change while a `Checkpoint` lives: a file that another
/// process truncates raises `SIGBUS` at the next read, as with every memory map.
pub struct Checkpoint {
    config: Map<String, Value>,
    shards: Vec<Bytes>,
    entries: BTreeMap<String, Entry>,
    /// Shards that the checkpoint has in all, present or not.
    total_shards: usize,
    is_gguf: bool,
    /// Files that a split GGUF model has, present or not.
    splits: Option<usize>,
    place: String,
}

enum Bytes {
    Mapped(Mmap),
    Memory(Cow<'static, [u8]>),
}

struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// From the start of the file.
    start: usize,
    end: usize,
    /// What GGUF's bytes hold.
    blocks: Option<gguf::Blocks>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({} tensors in {})", self.entries.len(), self.searched())
    }
}

impl Checkpoint {
    /// Opens `dir`: its `config.json` and the shards that `model.safetensors.index.json` (or the one
    /// `*.safetensors.index.json`) names and that are present; without an index every
    /// `*.safetensors` but `io.safetensors`; where there are none every `*.gguf`. Of a GGUF model too
    /// `config.json` says what the layer computes: the keys in GGUF files are not read.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Json`] for a file that cannot be read or parsed, [`Error::Safetensors`]
    /// for a shard whose header does not describe exactly the bytes behind it, [`Error::Invalid`] for
    /// such a GGUF file, a shard name that is a path, a tensor in two shards, a tensor that is not where the
    /// index says, a JSON key given twice, safetensors beside GGUF, and when there is no shard at all.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = dir.join("config.json");
        let gguf = list(dir, |name| name.ends_with(GGUF_SUFFIX))?;
        if let Some(file) = gguf.first().filter(|_| !config.exists()) {
            return Err(Error::invalid(
                config.display().to_string(),
                format!("no such file beside {}", file.display()),
                "the model's config.json, which says what the layer computes",
                "download config.json of the model that the GGUF file was made from into this folder",
            ));
        }
        let mut checkpoint = Self::empty(read_object(&config)?, dir.display().to_string());
        let index = find_index(dir)?;
        let files = match index {
            Some(_) => Vec::new(),
            None => list(dir, |name| name.ends_with(".safetensors") && name != NOT_WEIGHTS)?,
        };
        if let (Some(first), Some(other)) = (gguf.first(), index.as_ref().or(files.first())) {
            return Err(two_kinds(checkpoint.place, first, other));
        }
        if let Some(index) = index {
            checkpoint.open_indexed(dir, &index)?;
        } else if gguf.is_empty() {
            checkpoint.total_shards = files.len();
            for file in files {
                let bytes = map(&file)?;
                checkpoint.add(&file, bytes, |_| true)?;
            }
        } else {
            for file in gguf {
                let bytes = map(&file)?;
                checkpoint.add_gguf(&file, bytes)?;
            }
        }
        if checkpoint.shards.is_empty() {
            return Err(Error::invalid(
                checkpoint.place.clone(),
                checkpoint.searched(),
                "at least one *.safetensors shard or *.gguf file",
                "download the shards that hold the layer",
            ));
        }
        Ok(checkpoint)
    }

    /// A checkpoint from memory: the text of `config.json` and named shards, of GGUF if their names end in
    /// `.gguf`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], without those of the file system.
    pub fn from_bytes(config: &str, shards: Vec<(String, Cow<'static, [u8]>)>) -> Result<Self> {
        let mut checkpoint = Self::empty(parse_object(config, Path::new("config.json"))?, "memory".into());
        let named = |gguf: bool| shards.iter().find(|(name, _)| name.ends_with(GGUF_SUFFIX) == gguf);
        if let (Some((gguf, _)), Some((other, _))) = (named(true), named(false)) {
            return Err(two_kinds(checkpoint.place, Path::new(gguf), Path::new(other)));
        }
        for (name, bytes) in shards {
            let (path, bytes) = (Path::new(&name), Bytes::Memory(bytes));
            if name.ends_with(GGUF_SUFFIX) {
                checkpoint.add_gguf(path, bytes)?;
            } else {
                checkpoint.total_shards += 1;
                checkpoint.add(path, bytes, |_| true)?;
            }
        }
        Ok(checkpoint)
    }

    fn empty(config: Map<String, Value>, place: String) -> Self {
        let (shards, entries) = (Vec::new(), BTreeMap::new());
        Self { config, shards, entries, total_shards: 0, is_gguf: false, splits: None, place }
    }

    /// The object in `config.json`. A number that JSON cannot hold (`NaN`, `Infinity`, `1e999`) is
    /// `{"__float__": "NaN"}` and the like.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The tensor of this name, if one of the shards that are present holds it. Its bytes are
    /// exactly `shape` times the size of `dtype`. Quantised tensors of GGUF are U8, rows of blocks
    /// [.., rows, bytes of a row]; [`Checkpoint::gguf_format`] says what is in them.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, Entry { shard, dtype, shape, start, end, blocks: _ }) = self.entries.get_key_value(name)?;
        let bytes = self.shards.get(*shard)?.as_slice().get(*start..*end)?;
        Some(Tensor { name: Cow::Borrowed(name), dtype: *dtype, shape: shape.clone(), bytes })
    }

    /// What the blocks of a tensor of GGUF hold. `None` for tensors of plain numbers and where none of this
    /// name is present.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a type of ggml that nothing here reads. Its bytes are [`Checkpoint::tensor`]'s,
    /// as U8 without rows.
    pub fn gguf_format(&self, name: &str) -> Result<Option<WeightFormat>> {
        match self.entries.get(name).and_then(|entry| entry.blocks) {
            None => Ok(None),
            Some(gguf::Blocks::Of(format)) => Ok(Some(format)),
            Some(gguf::Blocks::Unread(ggml_type)) => Err(Error::Unsupported(Unsupported {
                backend: "moewe".into(),
                field: format!("{name}.type").into(),
                value: gguf::type_name(ggml_type),
                because: "of ggml's types F32, F16, BF16, Q8_0, Q4_K, Q6_K and MXFP4 are read".into(),
            })),
        }
    }

    /// Whether the tensors are those of GGUF files, and named as llama.cpp does.
    pub fn is_gguf(&self) -> bool {
        self.is_gguf
    }

    /// Names of all tensors that are present, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Bytes of all tensors that are present.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| (entry.end - entry.start) as u64).sum()
    }

    /// Where tensors were looked for, for messages: `2 of 163 shards in DIR`.
    pub fn searched(&self) -> String {
        format!("{} of {} shards in {}", self.shards.len(), self.total_shards, self.place)
    }

    fn open_indexed(&mut self, dir: &Path, index: &Path) -> Result<()> {
        let owners = read_index(index)?;
        let mut files: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, file) in &owners {
            files.entry(file).or_default().push(name);
        }
        self.total_shards = files.len();
        for (file, names) in files {
            let path = dir.join(file);
            // A shard that is not there is another layer's; a link to nothing is a damaged download.
            if !path.is_symlink() && !path.exists() {
                continue;
            }
            let bytes = map(&path)?;
            // Where two shards hold a tensor, the index decides.
            self.add(&path, bytes, |name| owners.get(name).is_none_or(|owner| owner == file))?;
            if let Some(name) = names.iter().find(|name| !self.entries.contains_key(**name)) {
                return Err(Error::invalid(
                    path.display().to_string(),
                    format!("no tensor {name}"),
                    format!("the tensors that {} says it holds", index.display()),
                    "download the shard or the index again",
                ));
            }
        }
        Ok(())
    }

    /// Adds the wanted tensors of a shard.
    fn add(&mut self, path: &Path, bytes: Bytes, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let data = bytes.as_slice();
        check_header(path, data)?;
        let damaged = |source| Error::Safetensors { path: path.to_owned(), source };
        let (header, metadata) = SafeTensors::read_metadata(data).map_err(damaged)?;
        let first = LENGTH_BYTES + header;
        for (name, info) in metadata.tensors() {
            if !wanted(&name) {
                continue;
            }
            let (start, end) = info.data_offsets;
            let (Some(start), Some(end)) = (first.checked_add(start), first.checked_add(end)) else {
                return Err(damaged(SafeTensorError::InvalidOffset(name)));
            };
            if end > data.len() || start > end {
                return Err(damaged(SafeTensorError::InvalidOffset(name)));
            }
            let (shard, dtype, shape) = (self.shards.len(), info.dtype, info.shape.clone());
            self.insert(path, name, Entry { shard, dtype, shape, start, end, blocks: None })?;
        }
        self.shards.push(bytes);
        Ok(())
    }

    /// Adds the tensors of a GGUF file. Files of split models say how many there are; the others are whole.
    fn add_gguf(&mut self, path: &Path, bytes: Bytes) -> Result<()> {
        let gguf::Header { split_count, tensors } = gguf::read(path, bytes.as_slice())?;
        self.is_gguf = true;
        let named = split_in_name(path);
        let count = match (split_count, named) {
            (Some(count), Some(named)) if count != named => {
                return Err(Error::invalid(
                    format!("{}: split.count", path.display()),
                    count,
                    format!("{named}, as the file's name says"),
                    "give the file its own name back or download it again",
                ));
            }
            (Some(count), _) | (None, Some(count)) => Some(count),
            (None, None) => None,
        };
        match (count, self.splits) {
            (None, _) => self.total_shards += 1,
            (Some(count), None) => {
                self.total_shards += count;
                self.splits = Some(count);
            }
            (Some(count), Some(first)) if count != first => {
                return Err(Error::invalid(
                    format!("{}: split.count", path.display()),
                    count,
                    format!("{first}, as the files before it say"),
                    "keep the files of one model in a folder",
                ));
            }
            (Some(_), Some(_)) => {}
        }
        for gguf::Info { name, dtype, shape, start, end, blocks } in tensors {
            self.insert(path, name, Entry { shard: self.shards.len(), dtype, shape, start, end, blocks })?;
        }
        self.shards.push(bytes);
        Ok(())
    }

    fn insert(&mut self, path: &Path, name: String, entry: Entry) -> Result<()> {
        if self.entries.contains_key(&name) {
            return Err(Error::invalid(
                name,
                format!("a second tensor of this name in {}", path.display()),
                "each tensor in one shard",
                "remove one of the shards or add the model's index file",
            ));
        }
        self.entries.insert(name, entry);
        Ok(())
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

/// What the parser does not look at: tensors named twice, and offsets so large that its sums overflow.
fn check_header(path: &Path, data: &[u8]) -> Result<()> {
    // A length or a text that makes no sense is left to the parser, which says what is wrong with it.
    let Some((length, rest)) = data.split_first_chunk::<LENGTH_BYTES>() else { return Ok(()) };
    let Some((header, behind)) =
        usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|length| rest.split_at_checked(length))
    else {
        return Ok(());
    };
    let Ok(text) = std::str::from_utf8(header) else { return Ok(()) };
    let tensors = match json::parse(text) {
        Ok(Value::Object(tensors)) => tensors,
        Ok(_) | Err(json::Fault::Syntax(_)) => return Ok(()),
        Err(json::Fault::Duplicate(key)) => return Err(duplicate_key(path, &key)),
    };
    for (name, tensor) in &tensors {
        let offsets = tensor.get("data_offsets").and_then(Value::as_array);
        for offset in offsets.into_iter().flatten() {
            if offset.as_u64().is_some_and(|offset| offset > behind.len() as u64) {
                return Err(Error::invalid(
                    format!("{}: {name}.data_offsets", path.display()),
                    offset,
                    format!("at most {}, the bytes behind the header", behind.len()),
                    "the file is cut off or damaged: download it again",
                ));
            }
        }
    }
    Ok(())
}

/// N of a name `...-0000I-of-0000N.gguf`.
fn split_in_name(path: &Path) -> Option<usize> {
    let stem = path.file_name()?.to_str()?.strip_suffix(GGUF_SUFFIX)?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (_, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits(number) && digits(count) { count.parse().ok() } else { None }
}

/// They may be different quantisations of the model, and nothing says which is meant.
fn two_kinds(place: String, gguf: &Path, other: &Path) -> Error {
    Error::invalid(
        place,
        format!("{} beside {}", gguf.display(), other.display()),
        "either safetensors or GGUF",
        "move the files that are not meant into a folder of their own",
    )
}

fn duplicate_key(path: &Path, key: &str) -> Error {
    Error::invalid(
        format!("{}: {key}", path.display()),
        "the key twice in one object",
        "each key once",
        "remove the value that is not meant",
    )
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    expect_file(path)?;
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    parse_object(&text, path)
}

fn parse_object(text: &str, path: &Path) -> Result<Map<String, Value>> {
    let found = match json::parse(text) {
        Ok(Value::Object(object)) => return Ok(object),
        Ok(Value::Null) => "null",
        Ok(Value::Bool(_)) => "a boolean",
        Ok(Value::Number(_)) => "a number",
        Ok(Value::String(_)) => "a string",
        Ok(Value::Array(_)) => "an array",
        Err(json::Fault::Syntax(source)) => return Err(Error::Json { path: path.to_owned(), source }),
        Err(json::Fault::Duplicate(key)) => return Err(duplicate_key(path, &key)),
    };
    Err(Error::invalid(path.display().to_string(), found, "one JSON object", "repair or download the file again"))
}

/// Files of `dir` whose name satisfies `wanted`, sorted.
fn list(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let failed = |source| Error::Io { path: dir.to_owned(), source };
    let mut files = Vec::new();
    for file in std::fs::read_dir(dir).map_err(failed)? {
        let file = file.map_err(failed)?;
        if wanted(&file.file_name().to_string_lossy()) {
            files.push(file.path());
        }
    }
    files.sort();
    Ok(files)
}

fn find_index(dir: &Path) -> Result<Option<PathBuf>> {
    let usual = dir.join("model.safetensors.index.json");
    if usual.exists() {
        return Ok(Some(usual));
    }
    let found = list(dir, |name| name.ends_with(INDEX_SUFFIX))?;
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [_, _, ..] => Err(Error::invalid(
            dir.display().to_string(),
            format!("{} files *{INDEX_SUFFIX}", found.len()),
            "one index",
            "name the index of this model model.safetensors.index.json",
        )),
    }
}

/// File name of each tensor.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let index = read_object(path)?;
    let Some(Value::Object(weight_map)) = index.get("weight_map") else {
        return Err(Error::invalid(
            format!("{}: weight_map", path.display()),
            index.get("weight_map").map_or("no such key".into(), Value::to_string),
            "an object from tensor to file",
            "download the index again",
        ));
    };
    let mut owners = BTreeMap::new();
    for (tensor, file) in weight_map {
        match file.as_str() {
            Some(file) if is_file_name(file) => owners.insert(tensor.clone(), file.to_owned()),
            Some(_) | None => {
                return Err(Error::invalid(
                    format!("{}: weight_map.{tensor}", path.display()),
                    file,
                    "the plain name of a *.safetensors file beside the index",
                    "remove the directory from the name or download the index again",
                ));
            }
        };
    }
    Ok(owners)
}

/// Whether `name` can only be a file of the directory itself, on every system.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
        && name.ends_with(".safetensors")
}

/// Opening a pipe would wait for its writer, reading a device might never end.
fn expect_file(path: &Path) -> Result<()> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let refused = |kind, reason| Err(failed(std::io::Error::new(kind, reason)));
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => refused(std::io::ErrorKind::InvalidInput, "not a regular file"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.is_symlink() => {
            refused(error.kind(), "a link to a file that is not there")
        }
        Err(error) => Err(failed(error)),
    }
}

fn map(path: &Path) -> Result<Bytes> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    expect_file(path)?;
    let file = File::open(path).map_err(failed)?;
    Ok(Bytes::Mapped(map_read_only(&file).map_err(failed)?))
}

#[allow(unsafe_code, reason = "the one memory map; the proof stands inside")]
fn map_read_only(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and read-only and lives as long as the slices taken from it. Nothing
    // here writes the file. If another process does, bytes may change (any bytes are legal values) or,
    // if it truncates the file, a read raises SIGBUS: `Checkpoint` documents that files must not change.
    unsafe { MmapOptions::new().map_copy_read_only(file) }
}
