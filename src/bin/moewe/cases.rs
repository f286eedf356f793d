//! Golden cases: where they are, and what their manifest says of them.

use std::path::{Path, PathBuf};

use moewe::{Error, Result};
use serde_json::{Map, Value};

const MANIFEST: &str = "MANIFEST.json";
/// Inputs and expected outputs of a case.
pub const IO: &str = "io.safetensors";

/// One case.
#[derive(Debug, Clone)]
pub struct Case {
    /// Name of its folder.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// What the manifest says of it; `None` without a manifest.
    pub entry: Option<Map<String, Value>>,
}

/// The cases of a folder: those of its manifest in order, or itself.
///
/// # Errors
/// An unreadable manifest, and a folder that is no case.
pub fn find(path: &Path) -> Result<Vec<Case>> {
    if path.join(MANIFEST).exists() {
        let cases = read_manifest(&path.join(MANIFEST))?;
        return Ok(cases.into_iter().enumerate().map(|(at, entry)| listed(path, at, entry)).collect());
    }
    let folder = absolute(path)?;
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let manifest = folder.parent().map(|parent| parent.join(MANIFEST)).filter(|manifest| manifest.exists());
    let entries = manifest.map_or(Ok(vec![]), |manifest| read_manifest(&manifest))?;
    let entry = entries.into_iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(&name));
    if entry.is_none() && !path.join(IO).exists() {
        return Err(Error::invalid(
            path.display().to_string(),
            "no case",
            format!("a folder with {MANIFEST} or {IO}"),
            "give the folder of golden cases, or of one",
        ));
    }
    Ok(vec![Case { name, folder, entry }])
}

fn listed(path: &Path, at: usize, entry: Map<String, Value>) -> Case {
    // An entry without a name has no folder either: opening it says so.
    let name = entry.get("name").and_then(Value::as_str).map_or_else(|| format!("cases[{at}]"), str::to_owned);
    Case { folder: path.join(&name), name, entry: Some(entry) }
}

/// With a last component, so that the name and the manifest beside can be found. Links are not followed.
fn absolute(path: &Path) -> Result<PathBuf> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let lexical = std::path::absolute(path).map_err(failed)?;
    if lexical.file_name().is_some() { Ok(lexical) } else { path.canonicalize().map_err(failed) }
}

fn read_manifest(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    let mut manifest: Map<String, Value> =
        serde_json::from_str(&text).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    match manifest.remove("cases") {
        // What is no object has no name, and fails as a case of its own.
        Some(Value::Array(cases)) => {
            Ok(cases.into_iter().map(|case| if let Value::Object(entry) = case { entry } else { Map::new() }).collect())
        }
        found => Err(Error::invalid(
            format!("{}: cases", path.display()),
            found.map_or_else(|| "no such key".to_owned(), |found| found.to_string()),
            "an array of objects",
            "repair or download the manifest again",
        )),
    }
}

impl Case {
    /// What the manifest calls it, if it says so.
    pub fn kind(&self) -> Option<&str> {
        self.entry.as_ref()?.get("kind")?.as_str()
    }

    /// The layer, if the manifest gives one.
    ///
    /// # Errors
    /// Something that is no layer.
    pub fn layer(&self) -> Result<Option<usize>> {
        match self.value("layer") {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|layer| usize::try_from(layer).ok()) {
                Some(layer) => Ok(Some(layer)),
                None => Err(self.wrong("layer", value, "a layer or null")),
            },
        }
    }

    /// Allowed error of the output that the object `atol` calls `part`; `None` where the manifest gives none.
    ///
    /// # Errors
    /// Something that is no tolerance.
    pub fn output_tolerance(&self, part: &str) -> Result<Option<f64>> {
        match self.value("atol") {
            Some(Value::Object(parts)) => parts.get(part).map(|value| self.positive("atol", value)).transpose(),
            Some(value) => self.positive("atol", value).map(Some),
            None => Ok(None),
        }
    }

    /// Allowed error of rows in which a code may flip; `None` where the manifest gives none.
    ///
    /// # Errors
    /// Something that is no tolerance.
    pub fn flip_tolerance(&self) -> Result<Option<f64>> {
        let key = "atol_flip_sensitive_tokens";
        self.value(key).map(|value| self.positive(key, value)).transpose()
    }

    /// Allowed error of the weights; `None` where the manifest gives none.
    ///
    /// # Errors
    /// Something that is no tolerance.
    pub fn weight_tolerance(&self) -> Result<Option<f64>> {
        if let Some(value) = self.value("atol_weights") {
            return self.positive("atol_weights", value).map(Some);
        }
        let key = "max_weight_err_f32_vs_f64";
        self.value(key).map(|value| Ok(8.0 * self.positive(key, value)?)).transpose()
    }

    /// A value that is there and not null.
    fn value(&self, key: &str) -> Option<&Value> {
        self.entry.as_ref()?.get(key).filter(|value| !value.is_null())
    }

    fn positive(&self, key: &'static str, value: &Value) -> Result<f64> {
        let number = value.as_f64().filter(|number| number.is_finite() && *number >= 0.0);
        number.ok_or_else(|| self.wrong(key, value, "a number of at least 0"))
    }

    fn wrong(&self, key: &'static str, found: &Value, expected: &str) -> Error {
        Error::invalid(format!("{MANIFEST}: {}.{key}", self.name), found, expected, "correct the manifest")
    }
}
