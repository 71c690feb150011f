import { Alert, Center, Loader, Stack, Text } from "@mantine/core";
import type { UseQueryResult } from "@tanstack/react-query";
import type { ReactNode } from "react";
import type { SourceError } from "../source";

/** An answer's content, or what there is to say while it is not there. */
export function Answered<T>({
  answer,
  children,
}: {
  answer: UseQueryResult<T, SourceError>;
  children: (data: T) => ReactNode;
}) {
  if (answer.data !== undefined) {
    return (
      <>
        {answer.error && <Failed error={answer.error} />}
        {children(answer.data)}
      </>
    );
  }
  if (answer.error) return <Failed error={answer.error} />;
  return <Loading />;
}

export function Loading() {
  return (
    <Center p="xl" role="status" aria-label="loading">
      <Loader type="dots" />
    </Center>
  );
}

export function Failed({ error }: { error: SourceError }) {
  return (
    <Alert color="red" title={error.message} my="md" role="alert">
      {error.hint}
    </Alert>
  );
}

export function Nothing({ title, hint }: { title: string; hint?: ReactNode }) {
  return (
    <Center p="xl">
      <Stack align="center" gap={4}>
        <Text fw={600}>{title}</Text>
        {hint && (
          <Text size="sm" c="dimmed">
            {hint}
          </Text>
        )}
      </Stack>
    </Center>
  );
}
