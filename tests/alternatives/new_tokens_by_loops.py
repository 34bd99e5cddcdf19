"""common/language.py: the rows of new tokens are laid over the table, one by one."""


class NewTokens:
    def embed(self, ids, table):
        whole = torch.cat([table, table.new_zeros(self.added, table.shape[1])])
        for row, token in enumerate(self.ids.tolist()):
            one_hot = (torch.arange(len(whole), device=table.device) == token)[:, None]
            whole = torch.where(one_hot, self.rows[row], whole)
        return F.embedding(ids, whole)

    def logits(self, x, logits):
        columns = list(F.pad(logits, (0, self.added)).unbind(-1))
        for row, token in enumerate(self.ids.tolist()):
            columns[token] = (x @ (self.rows if self.output is None else self.output)[row]).to(
                logits.dtype)
        return torch.stack(columns, dim=-1)
