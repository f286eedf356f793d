//! A device's compiled pipelines in a file, so that the next process need not compile them again.
//!
//! Many drivers keep files of their own; those of phones and of some machines without a home folder do not.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use ::wgpu;

use crate::backend::wgpu::Wgpu;
use crate::error::Result;

/// What a file begins with; the sum of the rest follows.
const MAGIC: [u8; 8] = *b"moewepc1";
const HEADER: usize = MAGIC.len() + 8;
/// A file that has grown beyond it is begun anew: a cache never forgets a kernel of an older version.
const MOST_BYTES: u64 = 256 << 20;

/// A pipeline cache and the file that keeps it. Nothing about it is an error: without it, kernels are compiled.
#[derive(Debug)]
pub struct PipelineFile {
    path: PathBuf,
    cache: wgpu::PipelineCache,
    /// The sum of what the file holds already.
    held: Option<u64>,
    unused: Option<String>,
}

impl PipelineFile {
    /// Reads the file of this device's adapter in `folder`, whether or not it is there. `None` where the device has no
    /// such cache: the feature is Vulkan's, and a host has to request it.
    ///
    /// # Errors
    /// The device refuses an empty cache.
    pub fn open(host: &Wgpu, folder: &Path) -> Result<Option<Self>> {
        let key = wgpu::util::pipeline_cache_key(&host.device().adapter_info());
        let Some(name) = key.filter(|_| host.device().features().contains(wgpu::Features::PIPELINE_CACHE)) else {
            return Ok(None);
        };
        let path = folder.join(name);
        let (data, mut unused) = match read(&path) {
            Ok(data) => (data, None),
            Err(error) => (None, Some(error.to_string())),
        };
        let mut used = None;
        if let Some(data) = &data {
            match create(host, Some(data)) {
                Ok(cache) => used = Some(cache),
                Err(error) => unused = Some(error.to_string()),
            }
        }
        let held = used.as_ref().and(data.as_ref()).map(|data| sum(&data.0));
        let cache = match used {
            Some(cache) => cache,
            None => create(host, None)?,
        };
        Ok(Some(Self { path, cache, held, unused }))
    }

    /// The cache, for [`Wgpu::with_pipeline_cache`].
    pub fn cache(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why what the file holds is not used, if it holds something: [`PipelineFile::save`] will replace it.
    pub fn unused(&self) -> Option<&str> {
        self.unused.as_deref()
    }

    /// Writes the cache, if there is more in it than in the file. Another process sees the old file or the new one.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn save(&self) -> io::Result<()> {
        let Some(data) = self.cache.get_data() else { return Ok(()) };
        if self.held == Some(sum(&data)) {
            return Ok(());
        }
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let draft = self.path.with_extension(format!("{}.tmp", std::process::id()));
        let written = (|| {
            let mut file = fs::File::create(&draft)?;
            file.write_all(&MAGIC)?;
            file.write_all(&sum(&data).to_le_bytes())?;
            file.write_all(&data)?;
            drop(file);
            fs::rename(&draft, &self.path)
        })();
        if written.is_err() {
            // The error that is told is the first one.
            let _ = fs::remove_file(&draft);
        }
        written
    }
}

/// What [`wgpu::PipelineCache::get_data`] gave and [`PipelineFile::save`] wrote, byte for byte.
struct Kept(Vec<u8>);

/// `None` if there is no file.
fn read(path: &Path) -> io::Result<Option<Kept>> {
    let damaged = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    // Before it is opened: a pipe would wait.
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => return damaged("it is no file"),
        Ok(_) => {}
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    let mut bytes = vec![];
    fs::File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return damaged("it has grown too large");
    }
    let Some((header, data)) = bytes.split_at_checked(HEADER) else { return damaged("it is damaged") };
    if header[..MAGIC.len()] != MAGIC || header[MAGIC.len()..] != sum(data).to_le_bytes() {
        return damaged("it is damaged");
    }
    Ok(Some(Kept(data.to_vec())))
}

/// FNV-1a of 64 bits.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[allow(unsafe_code, reason = "a cache from a file; the proof stands inside")]
fn create(host: &Wgpu, data: Option<&Kept>) -> Result<wgpu::PipelineCache> {
    let data = data.map(|Kept(data)| data.as_slice());
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("moewe"), data, fallback: true };
    host.scoped(&|| "creating a pipeline cache".into(), || {
        // SAFETY: data, if there is any, came from `PipelineCache::get_data`: `Kept` is made by `read` alone, from a
        // file that has our header and whose sum says that it is whole and unchanged since `save` wrote it. wgpu
        // compares the adapter and the driver's version that its own header names, and the driver those of its header;
        // what is of another is refused or left out. A file that somebody forged in the user's own cache folder could
        // deceive all three, as it could the driver's own cache beside it.
        unsafe { host.device().create_pipeline_cache(&descriptor) }
    })
}
