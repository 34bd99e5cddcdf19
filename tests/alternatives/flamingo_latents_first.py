"""flamingo.py: keys of latents before those of features, frames by hand, gates as factors."""


class ResamplerLayer:
    def forward(self, latents, media):
        x = self.latents_norm(latents)
        latents = latents + self.attn(x, torch.cat([x, self.media_norm(media)], dim=1))
        return latents + self.mlp(self.mlp_norm(latents))


class FrameEmbed:
    def forward(self, features):
        if self.weight is None:
            return features
        rows, F_ = len(self.weight), features.shape[2]
        if F_ == 1:
            return features + self.weight[0].to(features.dtype)
        table = []
        for frame in range(F_):
            place = frame * (rows - 1) / (F_ - 1)
            low = min(int(place), max(rows - 2, 0))
            high = min(low + 1, rows - 1)
            table.append(self.weight[low] + (place - low) * (self.weight[high] - self.weight[low]))
        return features + torch.stack(table)[:, None].to(features.dtype)


class GatedBlock:
    def forward(self, x, visual, media_mask, cache=None):
        gates = [torch.tanh(gate) for gate in (self.attn_gate, self.mlp_gate)]
        x = x + self.attn(self.attn_norm(x), visual, mask=media_mask, cache=cache) * gates[0]
        return x + self.mlp(self.mlp_norm(x)) * gates[1]
