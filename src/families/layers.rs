//! Which layers have experts: the rules that several families share.

use super::config::Config;
use super::model::Kinds;
use crate::error::Result;

const LISTED: &str = "mlp_layer_types";

impl Kinds {
    /// Every layer.
    pub(super) fn all(layers: usize) -> Self {
        Self { moe: vec![true; layers], keys: "num_hidden_layers" }
    }

    /// The layers of which this is true.
    pub(super) fn where_(layers: usize, keys: &'static str, moe: impl Fn(usize) -> bool) -> Self {
        Self { moe: (0..layers).map(moe).collect(), keys }
    }

    /// `mlp_layer_types`: a word for each layer. Absent and null mean that another rule holds.
    pub(super) fn listed(config: &Config<'_>, layers: usize) -> Result<Option<Self>> {
        let words = config.words(LISTED, &["sparse", "moe", "dense"])?;
        words.map(|words| Self::of_list(config, LISTED, words.iter().map(|word| *word != "dense"), layers)).transpose()
    }

    /// A list with an entry for each layer.
    pub(super) fn of_list(
        config: &Config<'_>,
        key: &'static str,
        list: impl ExactSizeIterator<Item = bool>,
        layers: usize,
    ) -> Result<Self> {
        if list.len() != layers {
            let found = format!("{} entries", list.len());
            return Err(config.contradiction(key, found, format!("num_hidden_layers = {layers}")));
        }
        Ok(Self { moe: list.collect(), keys: key })
    }

    /// `mlp_layer_types`, else all layers from `first_k_dense_replace` on.
    pub(super) fn listed_or_first(config: &Config<'_>) -> Result<Self> {
        let layers = config.num_layers()?;
        if let Some(kinds) = Self::listed(config, layers)? {
            // Configs that transformers wrote have the class's default beside the list that decides.
            config.get("first_k_dense_replace");
            config.get("moe_layer_freq");
            return Ok(kinds);
        }
        Self::first(config, layers)
    }

    /// All layers from `first_k_dense_replace` on, or every `moe_layer_freq`-th of them.
    pub(super) fn first(config: &Config<'_>, layers: usize) -> Result<Self> {
        let first = config.count(&["first_k_dense_replace"])?;
        // Absent from configs that transformers wrote: every layer from the first on.
        let every = config.optional_count("moe_layer_freq", 1)?.unwrap_or(1);
        let keys = "first_k_dense_replace and moe_layer_freq";
        Ok(Self::where_(layers, keys, |layer| layer >= first && layer.is_multiple_of(every)))
    }

    /// `mlp_layer_types`, else all layers from a first one that the family's code fixes. Keys of which other
    /// programs read it have to agree.
    pub(super) fn listed_or_fixed(config: &Config<'_>, first: usize) -> Result<Self> {
        let layers = config.num_layers()?;
        if let Some(kinds) = Self::listed(config, layers)? {
            config.get("first_k_dense_replace");
            config.get("moe_layer_freq");
            return Ok(kinds);
        }
        config.fixed("first_k_dense_replace", first)?;
        config.fixed("moe_layer_freq", 1)?;
        Ok(Self::where_(layers, "the family's code", |layer| layer >= first))
    }

    /// `decoder_sparse_step` and `mlp_only_layers`, of Qwen and its kin.
    pub(super) fn sparse_step(config: &Config<'_>, dense: &[usize]) -> Result<Self> {
        let layers = config.num_layers()?;
        let step = config.size(&["decoder_sparse_step"])?;
        let keys = "decoder_sparse_step and mlp_only_layers";
        Ok(Self::where_(layers, keys, |layer| (layer + 1).is_multiple_of(step) && !dense.contains(&layer)))
    }
}
