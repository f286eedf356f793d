// Tokens of this chunk. `total_tokens` is copied in by the encoder; the rest is fixed per chunk.
struct Params {
    total_tokens: u32,
    first_token: u32,
    chunk_tokens: u32,
    reserved: u32,
}

fn token_count() -> u32 {
    return min(max(params.total_tokens, params.first_token) - params.first_token, params.chunk_tokens);
}
