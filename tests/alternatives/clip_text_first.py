"""clip.py: texts are encoded before images; a text's feature by plain indexing."""


class TextTower:
    def forward(self, ids):
        if ids.shape[1] > len(self.pos_embed):
            raise ValueError(f"{ids.shape[1]} tokens, the context is {len(self.pos_embed)}")
        x = self.token_embed(ids) + self.pos_embed[:ids.shape[1]]
        x = self.transformer(x, mask=causal(ids.shape[1], device=ids.device))
        ends = [row.index(self.eos_id) if self.eos_id in row else 0 for row in ids.tolist()]
        return torch.stack([states[end] for states, end in zip(x, ends)])


class CLIP:
    def encode_image(self, images):
        x = to_float32(self.image_projection(self.image_features(images)))
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def forward(self, batch, gather=losses.no_gather):
        text = self.encode_text(batch["ids"])
        image = self.encode_image(normalize_pixels(batch["images"]))
        if "feature_gradients" in batch:
            return {"contrastive": batch["feature_gradients"].loss(image, text, self.scalars())}
        return {"contrastive": self.loss(image, text, self.scalars(), gather)}
